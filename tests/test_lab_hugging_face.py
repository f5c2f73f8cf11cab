"""A model of the lab as a Hugging Face folder: the same logits, the same tokens."""

import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")

from aftermax import hf  # noqa: E402
from aftermax.cli import main  # noqa: E402
from aftermax.lab.hugging_face import END, of_decoder, tokenizer_of  # noqa: E402
from aftermax.lab.models import DecoderLM  # noqa: E402
from aftermax.lab.trained import find  # noqa: E402
from aftermax.lab.work import Work, arm  # noqa: E402

WORK = Work(layers=2, width=48, heads=3, kv_heads=1)


def decoder_of(name, work=WORK):
    torch.manual_seed(0)
    decoder = DecoderLM(work, arm(name, work), vocabulary=300)
    with torch.no_grad():
        for parameter in decoder.parameters():  # gains and sinks too, so that a lost one is seen
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.eval()


@pytest.mark.parametrize(
    "name",
    ["softmax", "softmax/bare", "log-n", "sink", "lssar", "sigmoid/layerscale", "linear/rope"],
)
def test_the_same_logits(name, tmp_path):
    decoder = decoder_of(name)
    model = of_decoder(decoder, WORK, arm(name, WORK), end=256)
    tokens = torch.randint(300, (2, 40))
    with torch.no_grad():
        expected = decoder.logits(decoder(tokens))
        assert_close(model(tokens).logits, expected, atol=2e-5, rtol=1e-4)
        model.save_pretrained(tmp_path)
        assert_close(hf.load(tmp_path).eval()(tokens).logits, expected, atol=2e-5, rtol=1e-4)
    assert hf.check(model).ok
    assert type(model).__name__.startswith(
        "Llama" if "bare" in name or name == "lssar" else "Qwen3"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("softmax/alibi", "positions"),
        ("softmax/hybrid", "norms after"),
        ("softmax/gated", "a gate"),
        ("cosformer", "each layer"),
    ],
)
def test_what_is_no_such_model(name, said):
    with pytest.raises(ValueError, match=said):
        of_decoder(decoder_of(name), WORK, arm(name, WORK), end=256)


def test_a_run_becomes_a_folder(comparison, tmp_path, monkeypatch, capsys):
    out = comparison[0]
    trained = find(out, system="lssar")
    monkeypatch.setattr(
        "sys.argv",
        [
            "aftermax",
            "to-hugging-face",
            "--model",
            str(out),
            "--system",
            "lssar",
            "--to",
            str(tmp_path),
        ],
    )
    main()
    assert trained.name in capsys.readouterr().out
    model, tokenizer = (
        hf.load(tmp_path).eval(),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    text = "def f(x):\n\treturn 'é — ü'\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    decoder = trained.model()
    with torch.no_grad():
        assert_close(model(ids).logits, decoder.logits(decoder(ids)), atol=2e-5, rtol=1e-4)
    assert tokenizer.eos_token == END
    assert tokenizer.eos_token_id == trained.data().symbols.end
    assert tokenizer_of(trained.data())("a").input_ids == tokenizer("a").input_ids
