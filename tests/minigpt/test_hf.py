"""Models of ours in transformers, and its GPT-2 in ours: the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt import hf
from minigpt.backends import resolve
from minigpt.config import ModelConfig
from minigpt.errors import Damaged, UserError
from minigpt.model import GPT

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

OPS = resolve("eager", torch.device("cpu"))
SHAPE = {"vocab_size": 91, "block_size": 32, "n_layer": 3, "n_head": 4, "n_embd": 48}
IDX = torch.randint(0, 91, (3, 32), generator=torch.Generator().manual_seed(0))
TOKENIZER = {"kind": "characters"}


def model(**options):
    torch.manual_seed(1)
    made = GPT(ModelConfig(**SHAPE | options), OPS).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms too
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def theirs(**options):
    torch.manual_seed(2)
    names = {"vocab_size": 91, "n_positions": 32, "n_layer": 3, "n_head": 4, "n_embd": 48}
    config = transformers.GPT2Config(**names | {"bos_token_id": 2, "eos_token_id": 2} | options)
    made = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def logits(made):
    with torch.no_grad():
        found = made(IDX)
    return found[0] if isinstance(found, tuple) else found.logits


def imported(folder):
    config, weights = hf.read(folder)
    made = GPT(config, OPS).eval()
    made.load_state_dict(weights, strict=made.config.tied_head is False)
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"tied_head": False}, {"position": "sinusoidal"}, {"bias": False, "tied_head": False}],
    ids=str,
)
def test_an_exported_model_has_the_same_logits_there_and_back(options, tmp_path):
    ours = model(**options)
    hf.export(ours, TOKENIZER, tmp_path / "hf")
    there, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (logits(there.eval()) - logits(ours)).abs().max() <= 1e-5
    assert (logits(imported(tmp_path / "hf")) - logits(ours)).abs().max() <= 1e-5
    assert json.loads((tmp_path / "hf" / hf.TOKENIZER).read_text()) == TOKENIZER


@pytest.mark.parametrize(
    "options", [{}, {"tie_word_embeddings": False}, {"activation_function": "gelu_pytorch_tanh"}], ids=str
)
@pytest.mark.parametrize("kernels", ["eager", "torch"])
def test_a_gpt2_of_transformers_has_the_same_logits_here_and_back(options, kernels, tmp_path):
    made = theirs(**options)
    made.save_pretrained(tmp_path / "hf")
    ours = imported(tmp_path / "hf")
    ours.use(resolve(kernels, torch.device("cpu")))
    assert (logits(ours) - logits(made)).abs().max() <= 1e-5
    hf.export(ours, TOKENIZER, tmp_path / "again")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in made.state_dict().items())


def test_weights_in_several_files_and_without_the_prefix(tmp_path):
    made = theirs()
    made.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert (logits(imported(tmp_path / "parts")) - logits(made)).abs().max() <= 1e-5
    made.save_pretrained(tmp_path / "old")
    stored = load_file(tmp_path / "old" / "model.safetensors")
    # as the first GPT-2 files have it, with the causal masks
    stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    stored["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(stored, tmp_path / "old" / "model.safetensors")
    assert (logits(imported(tmp_path / "old")) - logits(made)).abs().max() <= 1e-5


def test_what_gpt2_cannot_express_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no bias in the output layer.*--no-head-bias"):
        hf.export(model(head_bias=True, tied_head=False), TOKENIZER, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken is there already"):
        hf.export(model(), TOKENIZER, tmp_path / "taken")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"n_inner": 100}, "n_inner is 100"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ],
    ids=str,
)
def test_what_ours_cannot_express_is_refused(options, said, tmp_path):
    theirs(**options).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=said):
        hf.read(tmp_path)


def test_folders_that_are_no_gpt2_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        hf.read(tmp_path / "none")
    with pytest.raises(Damaged, match=r"config\.json is missing"):
        hf.read(tmp_path)
    theirs().save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())

    def changed(said, **values):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | values))
        with pytest.raises(UserError, match=said):
            hf.read(tmp_path / "hf")

    changed("model_type is 'llama'", model_type="llama")
    changed(r"wte.weight is \(91, 48\), and should be \(92, 48\)", vocab_size=92)
    changed("h.3.ln_1.weight is nothing", n_layer=4)
    changed("tensors that GPT-2 does not have: transformer.h.2", n_layer=2)
    changed("damaged", n_layer="three")
    changed("n_head must divide", n_head=5)
    weights = tmp_path / "hf" / "model.safetensors"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Damaged):
        hf.read(tmp_path / "hf")
    weights.rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match="in a pickle, which could run any code"):
        hf.read(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    with pytest.raises(Damaged, match=r"index\.json is damaged"):
        hf.read(tmp_path / "hf")
