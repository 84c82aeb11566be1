import importlib.util
import json
import pickle
import subprocess
import sys

import pytest
import torch

from vtp import tokenizers
from vtp.tokenizers import get_tokenizer


def test_goldens(shared):
    golden = json.loads((shared / "fixtures/tokenizer/goldens.json").read_text())
    texts = golden["strings"]
    tokenizer = get_tokenizer()
    keep_case = get_tokenizer(clean="whitespace")
    assert tokenizer(texts).tolist() == golden["ids_ctx77"]
    assert get_tokenizer("ViT-B-32", context_length=16)(texts).tolist() == golden["ids_ctx16"]
    assert tokenizer(texts, context_length=16).tolist() == golden["ids_ctx16"]
    assert [tokenizer.encode(text) for text in texts] == golden["encode"]
    assert [tokenizer.decode(ids) for ids in golden["encode"]] == golden["decode"]
    assert [keep_case.encode(text) for text in texts] == golden["encode_clean_whitespace"]
    assert (tokenizer.vocab_size, tokenizer.sot_token_id, tokenizer.eot_token_id) == (49408, 49406, 49407)


def test_rows():
    tokenizer = get_tokenizer(context_length=8)
    empty, long = tokenizer(["", "word " * 50])
    assert empty.tolist() == [49406, 49407, 0, 0, 0, 0, 0, 0]
    assert long[-1] == 49407 and long.argmax() == 7
    assert tokenizer("a dog").shape == (1, 8) and tokenizer([]).shape == (0, 8)
    assert tokenizer("a dog").dtype == torch.long


def test_every_byte_survives():
    tokenizer = get_tokenizer(clean="whitespace")
    text = "".join(map(chr, range(0x21, 0x7F))).replace("&", "") + " ÿ é 日本 👍"
    assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_short_way_for_plain_ascii_equals_the_repairs():
    import ftfy

    for code in range(128):
        text = f"a{chr(code)}b &lt; c {chr(code)} it's <b>{chr(code)}</b>"
        assert get_tokenizer().encode(text) == get_tokenizer().encode(ftfy.fix_text(text)), code


def test_pickles():
    tokenizer = pickle.loads(pickle.dumps(get_tokenizer(context_length=12)))
    assert torch.equal(tokenizer("a photo"), get_tokenizer(context_length=12)("a photo"))


def test_open_clip_is_not_imported():
    code = "import sys; from vtp.tokenizers import get_tokenizer as g; g()('é'); assert 'open_clip' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_published_arguments():
    tokenizer = get_tokenizer("ViT-B-32", 16, "/anywhere", bpe_path=None, additional_special_tokens=None)
    assert tokenizer.context_length == 16
    assert get_tokenizer(context_length=0, additional_special_tokens=[], reduction_mask="").context_length == 77
    with pytest.raises(ValueError, match="additional_special_tokens=.*another tokenizer than the models'"):
        get_tokenizer(additional_special_tokens=["<x>"])


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="context_length=1"):
        get_tokenizer(context_length=1)
    with pytest.raises(ValueError, match="context_length=1"):
        get_tokenizer()("a photo", context_length=1)
    with pytest.raises(ValueError, match="clean='upper'"):
        get_tokenizer(clean="upper")
    tokenizers._vocabulary.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install open_clip_torch"):
        get_tokenizer()
