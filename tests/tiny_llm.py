"""A real language-model server with a tiny Llama: `python tests/tiny_llm.py FOLDER` writes the model and serves it.

The model is random but for its embedding and its head: these are wired so that it always gives the same answer. Left to
itself it begins with a word of courtesy; under a JSON schema it cannot.
"""

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

COURTESY = "Sure!"
PIECES = ['{"findings":', '[{"topic":"disease-pneumothorax"', ',"polarity":"absent"',
          ',"sentence":"Pneumothorax is absent."', "}]}"]
WIDTH, HEADS, HIDDEN, CONTEXT = 384, 4, 32, 16384
TEMPLATE = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}assistant:"
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # kinds of tokens


def vocabulary() -> tuple[list[str], list[int]]:  # tokens and their kinds
    """List the tokens: three special ones, all bytes, and the pieces of the answer."""
    pieces = [piece.replace(" ", "\u2581") for piece in (COURTESY, *PIECES)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return tokens, [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]


def head(
    size: int,  # of the vocabulary
) -> np.ndarray:  # float32 [size, WIDTH]
    """Wire each token to the one that follows it."""
    first, colon, end = size - len(PIECES), 3 + ord(":"), 2
    weight = np.zeros((size, WIDTH), dtype=np.float32)
    weight[first - 1, colon], weight[first, colon] = 1.0, 0.5  # rather the courtesy than the answer
    weight[first, first - 1] = 1.0
    for token in range(first, size):
        weight[token + 1 if token + 1 < size else end, token] = 1.0
    return weight


def write_model(
    path: Path,  # a .gguf file
) -> None:
    """Write the model with its tokenizer."""
    import gguf

    tokens, kinds = vocabulary()
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0 if kind == BYTE else -1e3 for kind in kinds])
    writer.add_token_types(kinds)
    for add, token in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(token)
    writer.add_chat_template(TEMPLATE)
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
    shapes |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", rng.normal(0, 1e-3, shape).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.add_tensor("token_embd.weight", np.eye(len(tokens), WIDTH, dtype=np.float32))
    writer.add_tensor("output.weight", head(len(tokens)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(
    folder: Path,  # for the model
) -> None:
    """Serve the model on a free port of the loopback, which is printed, until the process is ended."""
    import xllamacpp

    write_model(folder / "tiny.gguf")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(folder / "tiny.gguf")
    parameters.n_ctx = CONTEXT
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    server = xllamacpp.Server(parameters)
    print(f"listening: {server.listening_address}", flush=True)
    while True:
        time.sleep(60)


@contextmanager
def serving(
    folder: Path,  # for the model
):  # the server's address
    """Run the server as a process of its own."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = next(line.split()[-1] for line in process.stdout if line.startswith("listening: "))
        yield f"{address.rstrip('/')}/v1"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
