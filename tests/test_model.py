"""The decoder against transformers' three, its cache against none, and what it loads."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers

from fp4 import FP4Linear
from model import CHECKPOINT_FORMAT, GPT, ModelConfig, RMSNorm, rotate
from tools import hf

TINY = {"vocab_size": 97, "block_size": 32, "n_layer": 2, "head_dim": 16, "dim": 48, "ffn_dim": 80}


def tiny(**changes):
    config = ModelConfig(**{**TINY, "precision": "fp32", **changes})
    return GPT(config, torch.Generator().manual_seed(0))


def by_our_names(tensors, config):
    names = hf.parameter_names(config).items()
    return {name: torch.cat([tensors[part] for part in parts]) for name, parts in names}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "theta", "changes"),
    [
        ("Qwen3", 1e6, {}),
        ("Llama", 1e4, {"qk_norm": False, "norm_eps": 1e-2}),
        ("Qwen2", 1e6, {"qk_norm": False, "qkv_bias": True}),
    ],
)
def test_logits_and_gradients_equal_transformers(family, theta, changes, tied):
    ours = tiny(dim=64, block_size=256, tied=tied, rope_theta=theta, **changes)
    config = getattr(transformers, family + "Config")(
        vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        rope_parameters={"rope_theta": theta}, rms_norm_eps=ours.config.norm_eps,
        tie_word_embeddings=tied, initializer_range=0.15,
    )  # fmt: skip
    theirs = getattr(transformers, family + "ForCausalLM")(config)
    for name, p in theirs.named_parameters():
        if p.ndim == 1:
            p.data.normal_(0 if name.endswith("bias") else 1, 0.3)
    ours.load_state_dict(by_our_names(theirs.state_dict(), ours.config))
    tokens = torch.randint(97, (2, 256))
    expected = theirs(tokens, labels=tokens)
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    assert expected.logits.std() > 0.5
    torch.testing.assert_close(ours(tokens), expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)

    loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    gradients = by_our_names(gradients, ours.config)
    for name, p in ours.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_rotary_tables_are_fp32_whatever_the_default_dtype():
    """BF16 has steps of 4 radians at position 1,000."""
    model = tiny(rope_theta=5e5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        cos, sin = model.rope(1000, 24, "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    angle = torch.arange(1000, 1024).double()[:, None] * 5e5 ** -(torch.arange(8) / 8).double()
    torch.testing.assert_close(cos, angle.cos().float(), atol=2e-4, rtol=0)
    torch.testing.assert_close(sin, angle.sin().float(), atol=2e-4, rtol=0)


def test_norms_and_rotation_of_bf16_compute_in_fp32():
    x, norm = torch.randn(3, 5, 16).bfloat16(), RMSNorm(16, 1e-6)
    norm.weight.data.normal_()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    cos, sin = tiny().rope(1000, 5, "cpu")
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


def test_attention_is_causal():
    model, tokens = tiny(), torch.randint(97, (1, 32))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 97
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20:], b[:, 20:])


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights(tied):
    """Normal, .02, and less by sqrt(2 n_layer) for what writes to the residual stream; from the
    generator alone. So the first loss is that of a uniform guess."""
    changes = {"n_layer": 3, "dim": 128, "ffn_dim": 256, "qkv_bias": True, "tied": tied}
    model, again = tiny(**changes), tiny(**changes)
    for (name, p), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, other)
        if p.ndim == 2:
            std = 0.02 / 6**0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
    assert (model.head.weight is model.embedding.weight) == tied
    tokens = torch.randint(97, (8, 33))
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(4.575, abs=0.2)  # ln 97


@pytest.mark.parametrize(("last", "kept"), [(0, 3), (1, 2), (4, 0)])
def test_every_block_linear_follows_the_precision_but_those_of_the_last_blocks(last, kept):
    recipes = []
    for block in tiny(precision="fp4_mean", bf16_blocks=last, n_layer=3).blocks:
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        assert {type(m) for m in linears} == {FP4Linear} and len(linears) == 4
        recipes.append({m.recipe for m in linears})
    assert recipes == [{"fp4_mean"}] * kept + [{"bf16"}] * (3 - kept)


@pytest.mark.parametrize("prompt", [5, 32, 40])
def test_cached_generation_equals_recomputation(prompt, monkeypatch):
    """Of tokens that see the last 32; a longer prompt is cut to its last 32."""
    model, attention = tiny(), F.scaled_dot_product_attention
    for p in model.parameters():
        p.data.mul_(10 if p.ndim == 2 else 1)  # so that logits differ enough to choose by
    tokens = torch.randint(97, (2, prompt))
    got = model.generate(tokens, 40, temperature=0)

    def windowed(q, k, v, **_):
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        return attention(q, k, v, (distance >= 0) & (distance < 32), enable_gqa=True)

    monkeypatch.setattr(F, "scaled_dot_product_attention", windowed)
    expected = model(got[:, max(0, prompt - 32) : -1]).argmax(-1)[:, -40:]
    assert torch.equal(got, torch.cat((tokens, expected), 1))


def test_draws_follow_the_generator_the_temperature_and_top_k():
    model, tokens = tiny(), torch.randint(97, (1, 4))

    def draw(n, *args, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(tokens.expand(n, 4), 1, *args, generator=generator)[:, -1]

    logits = model(tokens)[0, -1]
    best = logits.topk(3).indices
    assert {draw(1, t, k).item() for t, k in ((0, 50), (5.0, 1), (1e-45, 50))} == {best[0].item()}
    assert torch.equal(draw(20), draw(20)) and not torch.equal(draw(20), draw(20, seed=2))
    share = torch.bincount(draw(2000, 0.05, 3), minlength=97) / 2000
    expected = torch.zeros(97).index_copy(0, best, (logits[best] / 0.05).softmax(-1))
    torch.testing.assert_close(share, expected, atol=0.05, rtol=0)


@pytest.fixture
def folder(tmp_path):
    """A run's folder, with as much in it as a model needs."""
    model = tiny(precision="fp4_mean")
    config = dataclasses.asdict(model.config) | {"seed": 7}  # a run's config has more fields
    state = {"format": CHECKPOINT_FORMAT, "step": 3, "config": config, "tokenizer": "bytes"}
    state |= {"tokenizer_hash": "", "data": "", "model": model.state_dict(), "optimizer": None}
    torch.save(state, tmp_path / "checkpoint.pt")
    return tmp_path


def test_a_run_is_loaded_with_what_else_it_knows(folder):
    here, there = GPT.load(folder), GPT.load(folder / "checkpoint.pt", precision="fp4")
    assert (here.config.precision, there.config.precision) == ("fp4_mean", "fp4")
    assert here.run["folder"] == there.run["folder"] == folder and not here.training
    assert (here.run["step"], here.run["config"]["seed"]) == (3, 7)
    assert not here.run.keys() & {"model", "optimizer"}
    tokens = torch.randint(97, (2, 32))
    expected = tiny(precision="fp4_mean")(tokens)
    assert torch.equal(here(tokens), expected) and not torch.equal(there(tokens), expected)


@pytest.mark.parametrize("how", ["missing", "half", "another format", "code"])
def test_what_is_no_checkpoint_of_ours_is_one_line(how, folder):
    """A pickle that names a class or a function of Python is none: nothing in it must run."""
    path = folder / "checkpoint.pt"
    whole, ours = path.read_bytes(), torch.load(path)
    path.unlink()
    if how == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif how != "missing":
        changes = {"another format": {"format": "nano"}, "code": {"step": folder}}
        torch.save(ours | changes[how], path)
    with pytest.raises(SystemExit, match=r"^error: .*checkpoint\.pt[^\n]*$"):
        GPT.load(folder)
