"""Models of Hugging Face: GPT-2's layers, LoRA's adapters, experts. Tiny, from configurations."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import precond
from precond import BNP, Objective, PreconditionedGD, Whitening, diagnose

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
IDS = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(0))


def gpt2():
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    drop = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, **tokens, **drop)
    return transformers.GPT2LMHeadModel(config)


def trained(model, optimizer, steps: int = 3) -> list[str]:
    """What is said in some steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            logits = model(input_ids=IDS).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
            optimizer.step()
    return [str(w.message) for w in caught if "input" in str(w.message)]


LAYERS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize(
    ("make", "acting"),
    [
        (precond.whitening, "Whitening"),
        (precond.auto, "Whitening"),
        (precond.bnp, "BNP"),
        (lambda m: precond.adam(m, inputs=BNP()), "BNP"),
        (lambda m: precond.muon(m, inputs=BNP()), "BNP"),
    ],
    ids=["whitening", "auto", "bnp", "adam with BNP", "muon with BNP"],
)
def test_gpt2_is_observed(make, acting):
    model = gpt2()
    with pytest.warns(UserWarning, match="'lm_head' shares its weight"):
        optimizer = make(model)
    assert trained(model, optimizer) == []
    for row in optimizer.explain().rows:
        layer = any(name in row.name for name in LAYERS)
        assert (acting in row.preconditioner) == layer, row
    assert "shares its weight" in optimizer.explain().rows[0].why or acting == "Whitening"


def test_a_step_of_gpt2_is_that_of_its_inputs():
    model, seen = gpt2().double(), {}
    layer = model.transformer.h[0].mlp.c_fc
    layer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach().flatten(0, 1)))
    with pytest.warns(UserWarning):
        optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP(decay=0.0, damping=0.0))
    before = layer.weight.detach().clone()
    assert trained(model, optimizer, 1) == []
    x = seen["x"]
    dw = (layer.weight.grad - x.mean(0)[:, None] * layer.bias.grad) / x.var(0, correction=0)[:, None]
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * dw, rtol=1e-8, atol=1e-10)


def test_gpt2_is_diagnosed():
    loss = lambda out, y: F.cross_entropy(out.logits.flatten(0, 1), y.flatten())  # noqa: E731
    found = diagnose(Objective(gpt2(), loss, [(IDS, IDS)]))
    assert [layer.name.removeprefix("transformer.h.0.") for layer in found.layers] == LAYERS
    assert found.undiagnosed == ("lm_head shares its weight with a layer that has other inputs; its inputs are not diagnosed",)


def test_adapters_are_observed_and_what_is_frozen_costs_nothing():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(gpt2(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = precond.whitening(model)
    read = []
    for site in optimizer._listening.observer.sites:
        for tap, _ in site.taps:
            reading = tap.moments
            tap.moments = lambda *args, name=site.name, reading=reading: (read.append(name), reading(*args))[1]
    assert trained(model, optimizer) == []
    assert read and all("lora_" in name for name in read)
    for row in optimizer.explain().rows:
        assert row.preconditioner == ("Whitening() ∘ RelativeRMS()" if "lora_" in row.name else "none (frozen)")
    for name, p in model.named_parameters():
        assert bool(optimizer.state.get(p)) == ("lora_" in name)
    assert all(optimizer.state[p]["outer.count"].item() > 0 for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_see_what_is_routed_to_them(implementation):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, num_experts_per_tok=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model, seen = transformers.MixtralForCausalLM(config), {}
    model.set_experts_implementation(implementation)
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach(), index=args[1]))
    with pytest.warns(UserWarning, match="gate"):
        optimizer = PreconditionedGD(model, lr=0.0, preconditioner=Whitening(decay=0.0, rank=None))
    assert trained(model, optimizer, 1) == []
    x, index = seen["x"], seen["index"]
    state = optimizer.state[experts.gate_up_proj], optimizer.state[experts.down_proj]
    for e in range(3):
        rows = x[(index == e).any(-1)]
        gate, up = F.linear(rows, experts.gate_up_proj[e]).detach().chunk(2, -1)
        for mine, h in zip(state, (rows, F.silu(gate) * up), strict=True):
            assert mine["count"][e] == len(rows)
            torch.testing.assert_close(mine["mean"][e], h.mean(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mine["covariance"][e], h.T.cov(correction=0), rtol=1e-3, atol=1e-6)
