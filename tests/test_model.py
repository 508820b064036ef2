"""The model against transformers' three, the KV cache against none, and the presets."""

import dataclasses
import json

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import fp4
from hf import from_transformers
from model import GPT, ModelConfig, frequencies
from run import PRESETS

TINY = {"vocab_size": 97, "block_size": 32, "n_layer": 2, "head_dim": 16, "dim": 48, "ffn_dim": 80}


def tiny(**changes):
    torch.manual_seed(0)
    return GPT(ModelConfig(**{**TINY, "precision": "fp32", **changes}))


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 5e5,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "rope", "changes"),
    [
        ("Qwen3", {"rope_theta": 1e6}, {"rope_theta": 1e6}),
        ("Llama", {"rope_theta": 1e6}, {"rope_theta": 1e6, "qk_norm": False}),
        ("Llama", LLAMA3, {"rope_theta": 5e5, "rope_factor": 8.0, "qk_norm": False}),
        ("Qwen2", {"rope_theta": 1e6}, {"rope_theta": 1e6, "qk_norm": False, "qkv_bias": True}),
    ],
    ids=["qwen3", "llama", "llama3", "qwen2"],
)
def test_logits_and_gradients_equal_transformers(family, rope, changes, tied):
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(
        vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        rope_parameters=rope, tie_word_embeddings=tied, initializer_range=0.15,
    )  # fmt: skip
    theirs = getattr(transformers, family + "ForCausalLM")(config)
    for name, p in theirs.named_parameters():
        if p.ndim == 1:
            p.data.normal_(0 if name.endswith("bias") else 1, 0.3)
    ours = tiny(dim=64, block_size=256, tied=tied, **changes)
    ours.load_state_dict(from_transformers(theirs.state_dict(), ours.config))
    tokens = torch.randint(97, (2, 256))
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)
    if "rope_factor" in changes:  # which matters within these positions
        ours.config.rope_factor = 1.0
        assert (ours(tokens) - expected).abs().max() > 0.1
        ours.config.rope_factor = 8.0

    ours(tokens[:, :-1], tokens[:, 1:]).backward()
    theirs(tokens, labels=tokens).loss.backward()
    theirs = {name: p.grad for name, p in theirs.named_parameters()}
    if tied:
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    grads = {name: p.grad for name, p in ours.named_parameters(remove_duplicate=False)}
    for name, expected in from_transformers(theirs, ours.config).items():
        torch.testing.assert_close(grads[name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotary_frequencies_are_those_of_llama_3(head_dim, factor):
    rope = {**LLAMA3, "factor": factor}
    theirs = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=rope)
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    config = ModelConfig(head_dim=head_dim, rope_theta=5e5, rope_factor=factor)
    assert scale == 1
    torch.testing.assert_close(frequencies(config), expected, atol=0, rtol=1e-6)


def test_biases_start_at_zero():
    biases = [p for name, p in tiny(qkv_bias=True).named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 and not any(p.any() for p in biases)


def test_cached_generation_equals_recomputation():
    model = tiny()
    for p in model.parameters():
        p.data.mul_(10 if p.ndim == 2 else 1)  # so that logits differ enough to choose by
    tokens = torch.randint(97, (2, 5))
    expected = tokens
    for _ in range(20):
        expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(tokens, 20, temperature=0), expected)


def test_generation_past_the_context_and_its_seed():
    model = tiny()

    def run(seed):
        start, generator = torch.zeros(1, 1).long(), torch.Generator().manual_seed(seed)
        return model.generate(start, 50, generator=generator)

    assert run(1).shape == (1, 51)
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert run(1).max() < 97


def test_the_cache_keeps_the_last_block_size_tokens():
    model, cache = tiny(), [[], []]
    for start in range(40):
        model(torch.full((1, 1), start), cache=cache, start=start)
    assert [k.shape for k, v in cache] == [v.shape for k, v in cache] == [(1, 2, 32, 16)] * 2


@pytest.mark.parametrize("chunks", [(10, 10), (1, 7, 12), (20, 30, 1, 9), (32, 32, 3)])
def test_several_tokens_into_a_cache_are_those_one_by_one(chunks):
    """Also past the context of 32 tokens, where each token sees the 32 that end with it."""
    model, total = tiny(), sum(chunks)
    tokens = torch.randint(97, (2, total))

    def logits(sizes):
        cache, start, parts = [[], []], 0, []
        for size in sizes:
            parts.append(model(tokens[:, start : start + size], cache=cache, start=start))
            start += size
        return torch.cat(parts, 1)

    torch.testing.assert_close(logits(chunks), logits([1] * total), atol=2e-5, rtol=0)
    if total <= 32:
        torch.testing.assert_close(logits(chunks), model(tokens), atol=2e-5, rtol=0)


def test_top_k_of_one_is_the_likeliest():
    model, tokens = tiny(), torch.randint(97, (1, 4))
    greedy = model.generate(tokens, 8, temperature=0)
    assert torch.equal(model.generate(tokens, 8, temperature=5.0, top_k=1), greedy)


def test_a_tiny_temperature_takes_the_likeliest():
    model, tokens = tiny(), torch.randint(97, (1, 4))
    greedy = model.generate(tokens, 8, temperature=0)
    assert torch.equal(model.generate(tokens, 8, temperature=1e-45), greedy)


def test_attention_is_causal():
    model = tiny()
    tokens = torch.randint(97, (1, 32))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 97
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20:], b[:, 20:])


def test_every_block_linear_follows_the_precision_except_the_last_n_blocks():
    model = tiny(precision="fp4_mean", bf16_blocks=1, n_layer=3)
    recipes = [
        {m.recipe for m in block.modules() if isinstance(m, fp4.FP4Linear)}
        for block in model.blocks
    ]
    assert recipes == [{fp4.linear_fp4_mean}] * 2 + [{fp4.linear_bf16}]
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert [m for m in linears if not isinstance(m, fp4.FP4Linear)] == [model.head]


@pytest.mark.parametrize(
    "change", [{"n_head": 3}, {"head_dim": 15}, {"n_kv_head": 0}, {"bf16_blocks": 3}]
)
def test_bad_shapes_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        tiny(**change)


def test_initial_weights_come_from_the_generator_alone():
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = GPT(ModelConfig(**TINY), torch.Generator().manual_seed(7))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_initial_loss_is_that_of_a_uniform_guess():
    tokens = torch.randint(97, (8, 33))
    loss = tiny()(tokens[:, :-1], tokens[:, 1:])
    assert abs(loss.item() - torch.tensor(97.0).log().item()) < 0.02


@pytest.mark.parametrize(
    ("preset", "vocabulary", "millions"),
    [
        ("nano", 4096, 4.2),
        ("small", 4096, 27.3),
        ("124m", 50304, 123.6),
        ("qwen3-0.6b", 151936, 596.0),
        ("qwen3-4b", 151936, 4022.5),
    ],
)
def test_presets_have_the_size_in_their_name(preset, vocabulary, millions):
    values = json.loads((PRESETS / f"{preset}.json").read_text())
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    config = ModelConfig(**{k: v for k, v in values.items() if k in names}, vocab_size=vocabulary)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_flops_are_six_a_matrix_parameter_and_attention():
    model = tiny(tied=False)
    blocks = 2 * (48 * (4 + 2 + 2) * 16 + 64 * 48 + 3 * 48 * 80)
    assert model.flops_per_token() == 6 * (blocks + 97 * 48) + 12 * 2 * 4 * 16 * 32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_numbers_must_be_finite_and_large_enough(value):
    with pytest.raises(ValueError, match=rf"norm_eps {value} is not a finite number above 0"):
        tiny(norm_eps=value)
    if value != 0:
        with pytest.raises(ValueError, match=rf"added_mean {value} is not a finite number of 0"):
            tiny(added_mean=value)


def test_a_model_built_on_meta_is_the_model():
    """to_empty leaves memory as it is: all that counts must be in the state dict."""
    here = tiny(precision="fp4", added_mean=4.0)
    with torch.device("meta"):
        there = GPT(here.config)
    there.to_empty(device="cpu").load_state_dict(here.state_dict())
    tokens = torch.randint(97, (2, 32))
    assert torch.equal(there(tokens), here(tokens))
