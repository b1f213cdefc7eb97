# Each target does its own set-up: `make test` or `make demo` is all that a fresh machine needs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export SQLX_OFFLINE := true
# How long the long crash tests may take, in seconds; 0 is as long as they need.
CRASH_SECONDS ?= 0
# How often the peers are measured; the median counts.
REPETITIONS ?= 1
export CYNAI_CRASH_SECONDS := $(CRASH_SECONDS)

.PHONY: help setup build release test test-crash test-models test-mcp demo demo-tools bench bench-peers check fmt sqlx ci clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: ## Install the Debian packages that building and testing need
	@scripts/setup build test

build: ## Compile for development
	@scripts/setup build
	cargo build

release: ## Compile for use: target/release/cynai
	@scripts/setup build
	cargo build --release

test: ## Run the tests, with a database of their own
	@scripts/setup build test
	@scripts/test usual

test-crash: ## Run the long crash tests (CRASH_SECONDS=600 for a slice of ten minutes)
	@scripts/setup build test
	@scripts/test crash_long

test-models: ## Run the tests with real models: small ones, on servers that are installed (and one compiled) for it
	@scripts/setup build test models llama-server
	@scripts/test models

test-mcp: ## Run the client side of MCP's conformance suite, for both revisions of the protocol
	@scripts/setup build test
	@scripts/test conformance

demo: ## Run the example: sandboxed jobs, a person's answer, and a kill -9 on the way
	@scripts/setup build test
	@scripts/demo

demo-tools: ## Run the example with tools and a model: a kill -9 between an act and its record
	@scripts/setup build test demo-tools
	@scripts/demo-tools

bench: ## Measure this machine: JSON lines
	@scripts/setup build test
	@scripts/bench

bench-peers: ## The same beside LangGraph and Restate, with ratios
	@scripts/setup build test peers
	@benches/peers/setup
	@scripts/bench | tee target/bench.jsonl
	@benches/peers/run $(REPETITIONS) | tee target/bench-peers.jsonl
	@benches/ratios.py target/bench.jsonl target/bench-peers.jsonl

check: ## Format, lints and documents, as CI wants them
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps

fmt: ## Format the sources
	cargo fmt

sqlx: ## Describe the queries again (.sqlx); needs PostgreSQL 15
	@scripts/sqlx-prepare

ci: ## What CI runs
	.ci/run

clean: ## Remove what was built
	cargo clean
