"""`aftermax generate`: what is streamed, from what, and what is said of it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aftermax.cli import main
from aftermax.lab.generate import Sampling, Spent, generate, show
from aftermax.lab.speakers import Held, OfHuggingFace, OfRun
from aftermax.lab.trained import find
from aftermax.lab.vision_work import VisionWork

from .lab_work import model_of, open_store, prepared, run_of, tiny_work, write_texts

GREEDY = Sampling(temperature=0)


@pytest.fixture
def run(monkeypatch, capsys):
    """Call `aftermax generate` with arguments: (exit code, standard output, standard error)."""

    def called(*arguments):
        monkeypatch.setattr("sys.argv", ["aftermax", "generate", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return called


def language_of(folder: Path, system: str, tokenizer: str, **options) -> OfRun:
    work = tiny_work(write_texts(folder / "texts"), tokenizer=tokenizer, vocabulary=300)
    corpus = prepared(work, folder)
    model = model_of(work, system, corpus.symbols.total).eval()
    with torch.no_grad():  # far from even, so that rounding decides nothing
        model.embed.weight.mul_(20)
    return OfRun(
        "run", model, corpus, options.pop("dtype", torch.float32), options.pop("impl", None)
    )


# ---- what is said ----


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("system", ["softmax/alibi", "lssar", "cosformer", "transnormer"])
def test_streamed_text_is_that_of_whole_passes(tmp_path, system, tokenizer):
    language = language_of(tmp_path, system, tokenizer)
    text = "".join(generate(language, "où été", GREEDY, 60, Spent()))

    model, end = language.model, language.corpus.symbols.end
    tokens, said = language.encode("où été"), b""
    for _ in range(60):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([tokens]))[:, -1])[0, : end + 1]
        token = int(logits.argmax())
        if token == end:
            break
        tokens.append(token)
        said += language.bytes_of(token)
    assert text == said.decode(errors="replace")
    assert text


def test_tokens_of_a_text_are_the_bytes_of_it(tmp_path):
    for tokenizer in ("bytes", "bpe"):
        language = language_of(tmp_path / tokenizer, "softmax", tokenizer)
        text = "où été, 𝛼 \x1b\n"
        pieces = [language.write(token) for token in language.encode(text)]
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)


def test_the_same_seed_says_the_same(tmp_path):
    def said(seed: int) -> str:
        language = language_of(tmp_path / "a" / str(seed), "lssar", "bytes")
        language.model.embed.weight.data.div_(20)
        return "".join(generate(language, "e", Sampling(1.0, None, 0.9, seed), 40, Spent()))

    first = said(0)
    shutil.rmtree(tmp_path / "a")
    assert said(0) == first
    assert said(1) != first


def test_what_is_no_text_is_never_said_and_an_empty_prompt_begins_a_document(tmp_path):
    language = language_of(tmp_path, "softmax", "bytes")
    symbols = language.corpus.symbols
    assert language.encode("") == [symbols.end]
    logits = language.read([symbols.end])
    assert logits[: symbols.end + 1].isfinite().all()
    assert (logits[symbols.end + 1 :] == -torch.inf).all()


def test_the_state_of_a_linear_system_does_not_grow(tmp_path):
    sizes = {}
    for system in ("softmax", "cosformer"):
        language = language_of(tmp_path / system, system, "bytes")
        sizes[system] = []
        for _ in range(3):
            language.read([101] * 10)
            sizes[system].append(language.state_bytes)
    assert len(set(sizes["cosformer"])) == 1
    first, *rest = sizes["softmax"]
    assert rest == [2 * first, 3 * first]


@pytest.mark.parametrize(
    ("given", "pieces"),
    [
        (b"a\xc3\xa9b", ["a", "", "é", "b"]),
        ("😀".encode(), ["", "", "", "😀"]),
        (b"\xff\xff\xff\xffa", ["", "", "", "\ufffd" * 4, "a"]),
        (b"\xe2\x82", ["", ""]),
    ],
)
def test_only_whole_characters_are_written(given, pieces):
    held = Held(lambda tokens: bytes(tokens).decode(errors="replace"))
    assert [held.write(byte) for byte in given] == pieces
    said = "".join(pieces) + held.rest()
    assert said == given.decode(errors="replace")


# ---- what is drawn ----


def draws(sampling: Sampling, logits: torch.Tensor, count: int = 400) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {sampling.choose(logits, generator) for _ in range(count)}


def test_sampling_draws_from_what_it_may():
    logits = torch.tensor([0.0, 3.0, 2.0, 2.5, -torch.inf])
    assert draws(Sampling(1.0), logits) == {0, 1, 2, 3}
    assert draws(Sampling(1.0, top_k=2), logits) == {1, 3}
    assert draws(Sampling(1.0, top_k=9), logits) == {0, 1, 2, 3}
    # shares 0.031, 0.491, 0.181 and 0.298: the third reaches 0.9
    assert draws(Sampling(1.0, top_p=0.9), logits) == {1, 2, 3}
    assert draws(Sampling(1.0, top_p=0.4), logits) == {1}
    assert draws(Sampling(0.01), logits) == {1} == draws(GREEDY, logits)
    assert draws(Sampling(1e-39), logits) == {1}


@pytest.mark.parametrize(
    "numbers", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0}]
)
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        Sampling(**numbers)


# ---- where it goes ----


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_control_characters_and_a_line_of_its_own():
    terminal, pipe = Terminal(), io.StringIO()
    for to in (terminal, pipe):
        show(iter(["a\x1b[31m", "", "\tb\n\x00"]), to)
    assert terminal.getvalue() == "a␛[31m\tb\n␀\n"
    assert pipe.getvalue() == "a\x1b[31m\tb\n\x00"


def test_a_store_a_run_and_a_checkpoint_say_the_same(run, comparison):
    out, _ = comparison
    trained = find(out, system="lssar")
    options = ("--prompt", "e", "--max-new-tokens", 20, "--threads", torch.get_num_threads())
    ways = (
        (out, "--system", "lssar"),
        (out, "--run", trained.name),
        (out / "runs" / trained.name,),
        (trained.checkpoint,),
    )
    said = [run("--model", *way, *options) for way in ways]
    code, text, told = said[0]
    assert code == 0
    assert text
    assert all(other[1] == text for other in said)
    assert trained.name in told
    assert trained.run.seed == 0
    for word in ("prompt: 1 token ", "tokens/s", "LSSAR", "KiB", "(20 new)"):
        assert word in told


def test_the_prompt_can_be_standard_input(run, comparison, monkeypatch):
    out, _ = comparison
    options = ("--model", out, "--system", "lssar", "--max-new-tokens", 9)
    monkeypatch.setattr("sys.stdin", io.StringIO("où"))
    assert run(*options, "--prompt", "-")[1] == run(*options, "--prompt", "où")[1]


def test_bfloat16_on_the_reference(run, comparison):
    out, _ = comparison
    options = ("--dtype", "bfloat16", "--impl", "reference", "--max-new-tokens", 3)
    code, _, told = run("--model", out, "--system", "lssar", "--prompt", "e", *options)
    assert code == 0
    assert "bfloat16" in told
    assert "reference: asked for" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "holds several models; give --system, one of softmax, lssar, log-n/p-rope"),
        (["--system", "cosine"], "has no model of cosine; it has softmax, lssar, log-n/p-rope"),
        (["--run", "nothing"], "holds no run nothing; its latest work has "),
        (["--system", "lssar", "--attention", "lssar"], "--attention is of Hugging Face folders"),
        (["--system", "lssar", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--system", "lssar", "--threads", "0"], "threads must be at least 1"),
        (["--system", "lssar", "--top-p", "2"], "top_p is a probability above 0, got 2"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(run, comparison, arguments, message):
    code, text, told = run("--model", comparison[0], *arguments)
    assert (code, text) == (2, "")
    assert message in told
    assert told.startswith("aftermax: ")


def test_a_run_whose_weights_are_gone_and_a_place_that_is_none(run, comparison, tmp_path):
    out, _ = comparison
    trained = find(out, system="softmax")
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "runs" / trained.name / "checkpoint.safetensors").unlink()
    assert "has no checkpoint" in run("--model", tmp_path / "out", "--run", trained.name)[2]
    assert find(tmp_path / "out", system="softmax").run.seed == 1
    assert "there is no such file" in run("--model", tmp_path / "nowhere")[2]
    (tmp_path / "empty").mkdir()
    told = run("--model", tmp_path / "empty")[2]
    assert "neither store.sqlite nor config.json" in told


def test_a_run_of_another_task_is_refused(run, tmp_path):
    work = VisionWork()
    images = run_of(work, SimpleNamespace(digest="d"))
    with open_store(tmp_path, images) as store:
        store.add_work("w", "quick", work.settings(), {}, {"digest": "d"})
    folder = tmp_path / "runs" / images.id
    folder.mkdir(parents=True)
    (folder / "checkpoint.safetensors").touch()
    told = run("--model", tmp_path)[2]
    assert "is of the task vision, whose models tell no next token" in told


def interrupt(*_):
    raise KeyboardInterrupt


def test_ctrl_c_ends_with_what_was_spent(run, comparison, monkeypatch):
    read = OfRun.read

    def interrupted(self, tokens):
        if sum(held.length for held in self.state[:1]) > 6:
            raise KeyboardInterrupt
        return read(self, tokens)

    monkeypatch.setattr(OfRun, "read", interrupted)
    options = ("--model", comparison[0], "--system", "lssar", "--prompt")
    code, text, told = run(*options, "eee")
    assert code == 130
    assert text
    assert "end:    Ctrl-C (5 new)" in told
    monkeypatch.setattr(OfRun, "encode", interrupt)
    code, text, told = run(*options, "eee")
    assert (code, text) == (130, "")
    assert "prompt: 0 tokens in 0 s, not measured" in told


def test_a_reader_that_goes_ends_it(comparison):
    out, _ = comparison
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "aftermax.cli", "generate"),
            *("--model", out, "--system", "lssar", "--prompt", "e"),
            *("--max-new-tokens", "100000", "--temperature", "3"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    told = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141, told
    assert "no one reads any more" in told


# ---- Hugging Face ----


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama with a byte-level tokenizer, in a folder."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: i for i, letter in enumerate(alphabet, start=1)}
    vocabulary["qz"] = len(vocabulary)
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("q", "z")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("attention", ["softmax", "lssar", "transnormer"])
def test_a_hugging_face_folder_says_what_its_own_generate_says(llama, attention):
    language = OfHuggingFace.open(llama, attention, torch.float32)
    text = "".join(generate(language, "où été", GREEDY, 30, Spent()))
    tokens = torch.tensor([language.encode("où été")])
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    whole = language.model.generate(tokens, attention_mask=mask, **options)
    assert text == language.tokenizer.decode(whole[0, tokens.shape[1] :], skip_special_tokens=True)
    assert text


def test_a_hugging_face_folder_from_the_command_line(run, llama):
    options = ("--prompt", "e", "--temperature", 0, "--attention", "lssar")
    code, text, told = run("--model", llama, *options)
    assert code == 0
    assert text
    assert "LSSAR on" in told or "reference" in told
    assert "the model's room of 40 tokens is full (39 new)" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "lssar"], "is a Hugging Face folder: --run, --system and --impl are of"),
        (["--attention", "nothing"], "no system is called 'nothing'"),
        (["--prompt", "e" * 40], "the prompt has 40 tokens, and "),
        ([], "has no token that begins a text: give a --prompt"),
    ],
)
def test_what_a_hugging_face_folder_cannot_do(run, llama, arguments, message):
    code, _, told = run("--model", llama, *arguments)
    assert code == 2
    assert message in told


def test_a_hugging_face_folder_with_states(llama, tmp_path):
    """Saved after `make_recurrent`: what decoding keeps is told, and goes the way of steps."""
    from aftermax import hf

    model = hf.load(llama, "linear", cache="recurrent")
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path)
    language = OfHuggingFace.open(tmp_path, None, torch.float32)
    language.read(language.encode("abc"))
    before = language.state_bytes
    language.read([5])
    assert language.state_bytes == before == sum(layer.bytes for layer in language.cache.layers) > 0
    assert "O(T^2)" not in language.explain(1, 4)


def test_a_folder_of_an_encoder_and_a_decoder(run, llama, tmp_path):
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=258, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=10, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path)
    code, _, told = run("--model", tmp_path, "--prompt", "a")
    assert code == 2
    assert "does not continue a prompt" in told


def test_spaces_stay_whatever_the_tokenizer_would_clean(llama):
    language = OfHuggingFace.open(llama, None, torch.float32)
    language.tokenizer.clean_up_tokenization_spaces = True
    language.encode("a ")
    assert "".join(map(language.write, language.encode(". x !"))) == ". x !"


def test_a_folder_without_weights_or_with_two_gguf_files(run, llama, tmp_path):
    shutil.copy(llama / "config.json", tmp_path)
    assert "holds no weights" in run("--model", tmp_path)[2]
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    assert "several GGUF files: a.gguf, b.gguf" in run("--model", tmp_path)[2]


@pytest.fixture
def gguf_file(llama, tmp_path):
    """The weights and the tokenizer of the small Llama as llama.cpp writes them."""
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    config = model.config
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(config.vocab_size))))
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges(["q z"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:  # llama.cpp turns neighbours, transformers halves
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "small.gguf"


def test_a_folder_with_a_gguf_file(run, llama, gguf_file):
    options = ("--prompt", "e", "--temperature", 0, "--max-new-tokens", 20)
    code, text, told = run("--model", gguf_file.parent, *options)
    assert code == 0, told
    assert text == run("--model", llama, *options)[1]


def test_nan_is_said(tmp_path):
    language = language_of(tmp_path, "softmax", "bytes")
    language.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="run gives NaN after 1 tokens"):
        list(generate(language, "e", GREEDY, 5, Spent()))


def test_the_number_of_threads_is_set(run, comparison, set_threads):
    run("--model", comparison[0], "--system", "lssar", "--threads", 2, "--max-new-tokens", 1)
    assert torch.get_num_threads() == 2
