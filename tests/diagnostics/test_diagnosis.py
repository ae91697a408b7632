"""κ of layer inputs against numpy on inputs that are written out, and planted problems that must be named."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import precond
from alike import alike
from precond import BNP, RMS, PreconditionedGD
from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import diagnose, preconditioner_of
from precond.analysis.diagnostics.gathering import gather
from precond.analysis.diagnostics.remedies import standardized


def objective_of(model, x, outputs=2, batches=3, **options):
    torch.manual_seed(2)
    y = torch.randn(len(x), outputs, dtype=x.dtype)
    size = -(-len(x) // batches)

    def loss(out, t):
        return (out.flatten(1)[:, :outputs] - t).square().mean()

    return Objective(model, loss, list(zip(x.split(size), y.split(size), strict=True)), **options)


def spread_inputs(n=200, features=6):
    torch.manual_seed(0)
    mix = torch.eye(features).double() + 0.3 * torch.randn(features, features).double()
    scaled = torch.randn(n, features).double() @ mix * torch.logspace(-2, 2, features).double()
    return scaled + torch.linspace(-5, 9, features).double()


def kappa(rows, rank=None):
    values = np.linalg.svd(rows, compute_uv=False)[: rank or min(rows.shape)]
    return float((values[0] / values[-1]) ** 2)


def extended(h):
    return np.concatenate([np.ones((len(h), 1)), h], axis=1)


def step(model, objective, optimizer, times=4):
    for _ in range(times):
        for x, y in objective.batches:
            optimizer.zero_grad()
            objective.loss_fn(model(x), y).backward()
            optimizer.step()
    return optimizer


def test_kappas_of_both_layers():
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double(), spread_inputs()
    found = diagnose(objective_of(model, x))
    with torch.no_grad():
        inputs = {"0": x.numpy(), "2": model[:2](x).numpy()}
    assert [layer.name for layer in found.layers] == ["0", "2"]
    assert [layer.source for layer in found.layers] == ["data", "tanh"]
    for layer in found.layers:
        h = inputs[layer.name]
        mean, std = h.mean(0), h.std(0)
        expected = {"raw": h, "centered": h - mean, "scaled": h / std, "bnp": (h - mean) / std}
        for name, rows in expected.items():
            np.testing.assert_allclose(layer.spectra.kappa(name), kappa(extended(rows)), rtol=1e-8, err_msg=name)
        C = np.cov(h.T, bias=True)
        damped = C + 1e-3 * np.diag((h**2).mean(0))
        values = np.append(np.linalg.eigvals(np.linalg.solve(damped, C)).real, 1.0)
        np.testing.assert_allclose(layer.spectra.kappa("whitened"), values.max() / values.min(), rtol=1e-8)
        np.testing.assert_allclose(layer.correlation, np.corrcoef(h.T), atol=1e-10)
        d = layer.drivers
        np.testing.assert_allclose(d.means * d.scales * d.correlation, layer.spectra.kappa("raw"))
        np.testing.assert_allclose([d.offset, d.spread], [(abs(mean) / std).max(), std.max() / std.min()], rtol=1e-8)
        assert layer.samples == layer.used == 200


def test_badly_scaled_inputs_keep_their_digits():
    # κ = 1e24 is beyond what squares in float64 hold.
    x = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]).double() * torch.tensor([1e-6, 1e6]).double()
    (layer,) = diagnose(objective_of(nn.Linear(2, 2).double(), x, batches=1)).layers
    assert layer.spectra.kappa("raw") == pytest.approx(1e24, rel=1e-3)
    assert layer.spectra.kappa("bnp") == pytest.approx(1.0)
    assert layer.spectra.rank == 3


def test_rank_does_not_depend_on_scales():
    x = spread_inputs(features=4)
    x = torch.cat([x, x[:, :2].sum(1, keepdim=True), torch.zeros(len(x), 1), torch.full((len(x), 1), 7.0)], 1).double()
    for dtype in (torch.float64, torch.float32):
        (layer,) = diagnose(objective_of(nn.Linear(7, 2).to(dtype), x.to(dtype))).layers
        assert (layer.spectra.rank, layer.spectra.size) == (5, 8)
        assert (layer.units.dead, layer.units.constant) == (1, 1)
        assert layer.spectra.kappa("raw") == pytest.approx(kappa(extended(x.numpy()), 5), rel=1e-4)


def test_without_a_bias():
    x = spread_inputs()
    model = nn.Linear(6, 2, bias=False).double()
    (layer,) = diagnose(objective_of(model, x)).layers
    h = x.numpy()
    assert layer.spectra.kappa("raw") == pytest.approx(kappa(h))
    assert layer.spectra.kappa("bnp") == pytest.approx(kappa(h / np.sqrt((h**2).mean(0))))
    assert math.isnan(layer.spectra.kappa("centered"))
    assert layer.kappa_biased == pytest.approx(kappa(extended((h - h.mean(0)) / h.std(0))))
    # A bias that is not among the objective's parameters does not count either.
    frozen = nn.Linear(6, 2).double()
    (other,) = diagnose(objective_of(frozen, x, params="weight")).layers
    assert other.spectra.kappa("raw") == pytest.approx(kappa(h))


@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions_see_patches(padding):
    torch.manual_seed(3)
    x = torch.randn(9, 2, 5, 5).double() * torch.tensor([1.0, 30.0]).double()[:, None, None] + 4
    model = nn.Conv2d(2, 3, 3, padding=padding).double()
    (layer,) = diagnose(objective_of(model, x)).layers
    patches = nn.functional.unfold(x, 3, padding=padding).transpose(1, 2).reshape(-1, 18).numpy()
    assert layer.spectra.kappa("raw") == pytest.approx(kappa(extended(patches)), rel=1e-8)
    mean, std = x.mean((0, 2, 3)).repeat_interleave(9).numpy(), x.std((0, 2, 3), correction=0).repeat_interleave(9).numpy()
    assert layer.spectra.kappa("bnp") == pytest.approx(kappa(extended((patches - mean) / std)), rel=1e-4)
    assert layer.units.total == 2


def test_a_channel_is_dead_where_all_its_entries_are():
    x = torch.randn(20, 3, 1, 1, generator=torch.Generator().manual_seed(0))  # of a patch only the middle is not padding
    x[:, 1] = 0
    (layer,) = diagnose(objective_of(nn.Conv2d(3, 2, 3, padding=1), x)).layers
    assert (layer.units.total, layer.units.dead) == (3, 1)


def test_groups_show_the_worst():
    torch.manual_seed(3)
    x = torch.randn(50, 4, 3).double() * torch.tensor([1.0, 1.0, 1.0, 100.0]).double()[:, None]
    (layer,) = diagnose(objective_of(nn.Conv1d(4, 4, 1, groups=2).double(), x)).layers
    assert layer.spectra.kappa("raw") == pytest.approx(kappa(extended(x[:, 2:].transpose(1, 2).reshape(-1, 2).numpy())))


def test_attention_and_shared_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.shared = nn.Linear(4, 4)

        def forward(self, x):
            h, _ = self.attention(x, x, x)
            return self.shared(torch.tanh(self.shared(h)))

    torch.manual_seed(4)
    model, x = Net().double().eval(), spread_inputs(60, 4).reshape(15, 4, 4)
    seen = []
    handle = model.shared.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().reshape(-1, 4)))
    model(x)
    handle.remove()
    layers = {layer.name: layer for layer in diagnose(objective_of(model, x, batches=1)).layers}
    assert layers["attention.in_proj_weight"].spectra.kappa("raw") == pytest.approx(kappa(extended(x.reshape(-1, 4).numpy())))
    assert layers["attention.out_proj"].source == "attention"
    assert layers["shared"].samples == 120
    assert layers["shared"].spectra.kappa("raw") == pytest.approx(kappa(extended(torch.cat(seen).numpy())), rel=1e-6)


OPTIMIZERS = {
    "torch Adam": lambda model: torch.optim.Adam(model.parameters()),
    "RMSprop": lambda model: precond.rmsprop(model),
    "BNP": lambda model: PreconditionedGD(model, preconditioner=BNP()),
    "BNP∘RMS": lambda model: PreconditionedGD(model, preconditioner=BNP() @ RMS()),
    "whitening∘adam": lambda model: precond.adam(model, inputs=precond.Whitening()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kappa_with_the_optimizers_own_p(name):
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)).double(), spread_inputs()
    objective = objective_of(model, x)
    optimizer = step(model, objective, OPTIMIZERS[name](model))
    layer = diagnose(objective, optimizer).layers[0]
    # Row r of the weight and entry r of the bias, cut out of the dense P.
    P = preconditioner_of(optimizer, objective).to_dense().numpy()
    kappas = []
    for r in range(3):
        own = [18 + r, *range(6 * r, 6 * r + 6)]
        kappas.append(kappa(extended(x.numpy()) @ P[np.ix_(own, own)]))
    assert layer.spectra.kappa("optimizer") == pytest.approx(sorted(kappas)[1], rel=1e-6)
    assert layer.kappa_now == layer.spectra.kappa("optimizer")


def test_neurons_without_a_gradient_do_not_hide_the_others():
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)).double(), spread_inputs()
    with torch.no_grad():
        model[0].bias[:7] = -1e4
    objective = objective_of(model, x)
    optimizer = step(model, objective, torch.optim.Adam(model.parameters(), lr=1e-4))
    P = preconditioner_of(optimizer, objective).to_dense().diagonal().numpy()
    kappas = [kappa(extended(x.numpy()) * P[[54 + r, *range(6 * r, 6 * r + 6)]]) for r in (7, 8)]
    (layer, _) = diagnose(objective, optimizer).layers
    assert min(abs(layer.spectra.kappa("optimizer") / k - 1) for k in kappas) < 1e-6
    assert layer.spectra.kappa("optimizer") != pytest.approx(layer.spectra.kappa("raw"), rel=0.01)


def test_a_p_that_mixes_neurons_is_left_out_with_a_note():
    torch.manual_seed(1)
    model, x = nn.Linear(6, 2).double(), spread_inputs()
    objective = objective_of(model, x)
    mixing = PreconditionedGD(model, preconditioner=precond.Fixed(precond.Dense(torch.randn(14, 14).double())))
    found = diagnose(objective, mixing)
    assert "optimizer" not in found.columns and "P mixes neurons" in found.notes[0] and "gauss_newton" in found.notes[0]


def test_the_matrix_of_a_layer():
    torch.manual_seed(1)
    model, x = nn.Linear(6, 2).double(), spread_inputs()
    objective = objective_of(model, x)
    optimizer = step(model, objective, PreconditionedGD(model, preconditioner=BNP(decay=0.0, damping=0.0)))
    found = diagnose(objective, optimizer, curvature="hessian")
    block = found.layers[0].curvature
    # The loss averages squares over 2 outputs: H = ĥĥᵀ ⊗ I.
    assert block.before.kappa == pytest.approx(kappa(extended(x.numpy())), rel=1e-3)
    P = preconditioner_of(optimizer, objective).to_dense().numpy()
    H = np.kron(np.eye(2), extended(x.numpy()).T @ extended(x.numpy()) / len(x))
    order = [*range(1, 7), *range(8, 14), 0, 7]
    values = np.linalg.eigvalsh(P.T @ H[np.ix_(order, order)] @ P)
    assert block.after.kappa == pytest.approx(values[-1] / values[0], rel=1e-3)
    assert found.lam_max == pytest.approx(values[-1], rel=1e-3)


# --- planted problems ------------------------------------------------------------------------------------------------------


def mlp(features=8, hidden=16, activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, hidden), activation(), nn.Linear(hidden, 2))


def test_bad_scales_are_named_first():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 8)
    first = diagnose(objective_of(mlp(), x)).advice[0]
    assert "Standardize the data" in first.what and "from scales" in first.why and first.layers == ("0",)
    # κ alone promises a million; what is told stays below what a training of that length can show.
    assert first.gain.alone > 1e4 and first.gain.likely > 1.2 and first.gain.high <= first.gain.steps


@pytest.mark.parametrize("recipe", ["whitening", "bnp", "auto", "adamw"])
def test_raw_features_are_standardized_first_whatever_the_optimizer(recipe):
    """Coordinates of inputs do not undo at once that first outputs are as large as raw features are."""
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 3, 8) + 100
    model = mlp()
    found = diagnose(objective_of(model, x), getattr(precond, recipe)(model))
    assert "Standardize the data" in found.advice[0].what
    assert "such intervals held" in str(found) and "In a study" not in str(found)


def test_large_means_are_named_first():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) + 500
    found = diagnose(objective_of(mlp(), x))
    assert found.layers[0].drivers.main == "means"
    assert "Standardize the data" in found.advice[0].what and "from means" in found.advice[0].why


def test_dead_units_are_named():
    model = mlp()
    with torch.no_grad():
        model[0].bias[:12] = -100.0
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    found = diagnose(objective_of(model, x))
    assert found.layers[1].units.dead == 12
    (about,) = [a for a in found.advice if "died" in a.what]
    assert "12 of the 16 units" in about.why and "12 of 16 inputs" in about.promise and about.layers == ("2",)


def test_saturated_units_are_named():
    model = mlp(activation=nn.Tanh)
    with torch.no_grad():
        model[0].weight[:8] *= 1000
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    found = diagnose(objective_of(model, x))
    assert found.layers[1].units.saturated == 8
    assert any("saturation" in a.what for a in found.advice)


def test_constant_features_and_a_missing_bias_are_named():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) + 30
    x[:, :2] = 4.0
    model = mlp()
    model[0] = nn.Linear(8, 16, bias=False)
    advice = diagnose(objective_of(model, x)).advice
    assert any("carry nothing" in a.what and "2 of the 8 features" in a.why for a in advice)
    assert any("bias" in a.what and a.layers == ("0",) for a in advice)
    assert "Standardize" in advice[0].what


def bad_scales():
    return torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 8) + 3


class Shifted(nn.Module):
    """A parameter is added to the data before any layer receives them."""

    def __init__(self, model):
        super().__init__()
        self.shift, self.model = nn.Parameter(torch.zeros(8)), model

    def forward(self, x):
        return self.model(x + self.shift)


def test_a_normalization_is_a_reason_only_where_there_is_one():
    normalized, frozen = nn.Sequential(nn.LayerNorm(8), mlp()), mlp()
    frozen[0].weight.requires_grad_(False)
    for model, named in ((normalized, True), (frozen, False), (Shifted(mlp()), False)):
        first = diagnose(objective_of(model, bad_scales())).advice[0]
        assert "Standardize" in first.what and not first.layers
        assert ("normalization" in first.why) == named and ("No layer that receives the data" in first.why) != named


def test_one_sample_gives_no_advice_about_scales():
    model, x = mlp(activation=nn.Tanh), bad_scales()[:1]
    found = diagnose(Objective(model, nn.functional.mse_loss, [(x, torch.zeros(1, 2))]))
    assert not found.advice and {c.why for c in found.considered} == {"one sample shows neither means nor scales"}


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_data_that_do_not_change_are_named_and_nothing_that_follows_from_it(value):
    (about,) = diagnose(objective_of(mlp(activation=nn.Tanh), torch.full((60, 8), value))).advice
    assert "no feature changes" in about.what and "All 8 features" in about.why and about.layers == ("0",)


def test_units_that_cannot_die_are_not_said_to_have_died():
    model = mlp(activation=nn.Tanh)
    nn.init.zeros_(model[0].weight)
    found = diagnose(objective_of(model, bad_scales()))
    (about,) = [a for a in found.advice if a.layers == ("2",)]
    assert "never change" in about.what and "ReLU" not in about.code


def test_features_in_a_small_unit_are_standardized_by_the_objective_and_by_the_code():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, -6, 8)
    x[:, 3] = 5.0
    changed = standardized(objective_of(mlp(), x), None)
    (advice,) = [a for a in diagnose(objective_of(mlp(), x)).advice if "Standardize" in a.what]
    names = {"inputs": x}
    exec(advice.code.rpartition("\n")[0].partition("\noptimizer")[0], names)
    varies = [i for i in range(8) if i != 3]
    for made in (torch.cat([x for x, _ in changed.batches]), names["inputs"]):
        torch.testing.assert_close(made.std(0)[varies], torch.ones(7), rtol=0.01, atol=0.0)
        assert float(made[:, 3].abs().max()) < 1e-5


@pytest.mark.parametrize("value", [1e-3, 0.1, 1.0, 3.3, 100.0, 1e4, 123456.7, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, "float32, measured in float64"])
def test_a_constant_has_no_spread_whatever_its_size(dtype, value):
    """In a matrix of 3,000 rows a column's rounding, left by a factorization, is 1e-14 of its size in float64: none of it is a direction."""
    there = dtype if isinstance(dtype, torch.dtype) else torch.float32
    torch.manual_seed(0)
    x = torch.randn(3000, 4, dtype=there)
    x[:, 2] = value
    x[::2, 2] = torch.nextafter(x[::2, 2], torch.full((), math.inf, dtype=there)) if dtype != torch.float64 else value
    objective = objective_of(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(there), x, batches=60)
    if there is not dtype:
        objective = objective.double()
    layer = diagnose(objective, curvature="none").layers[0]
    others = torch.cat([x[:, :2], x[:, 3:]], dim=1).double()
    assert layer.spectra.rank == 4 and layer.units.constant == 1
    assert layer.drivers.spread == pytest.approx(float(others.std(0).max() / others.std(0).min()), rel=1e-6)
    # The constant stands for the bias beside it: [1, c] is one direction, of length √(1 + c²).
    assert layer.spectra.kappa("bnp") == pytest.approx(kappa(extended((others - others.mean(0)) / others.std(0))), rel=0.02)
    c = torch.full((3000, 1), math.sqrt(1 + value**2), dtype=torch.float64)
    assert layer.spectra.kappa("raw") == pytest.approx(kappa(torch.cat([c, others], dim=1)), rel=1e-4)


def test_a_learning_rate_beyond_stability_is_named():
    model, x = mlp(), torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    objective = objective_of(model, x)
    found = diagnose(objective, torch.optim.SGD(model.parameters(), lr=100.0), curvature="gauss_newton")
    assert "Lower the learning rate" in found.advice[0].what
    assert found.lr == 100.0 and found.lr_limit == 2 / found.lam_max < 100


def test_nothing_stands_out():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    found = diagnose(objective_of(nn.Linear(3, 2), signs, batches=1))
    assert found.advice == () and "Nothing stands out" in str(found)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=1e-9), "preconditioner=precond.Whitening()"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=1e-9, momentum=0.5), 'momentum=precond.Momentum(0.5, "heavy_ball")'),
        (lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.1), "weight_decay=0.1, inputs=precond.Whitening())"),
        (lambda m: precond.adam(m), "precond.adam(model, lr=0.001, inputs=precond.Whitening())"),
        (lambda m: torch.optim.Adagrad(m.parameters()), "precond.Whitening() @ precond.AdaGrad()"),
        (lambda m: torch.optim.RMSprop(m.parameters()), "precond.Whitening() @ precond.RMS("),
    ],
    ids=["sgd", "momentum", "adamw", "ours", "adagrad", "rmsprop"],
)
def test_advice_fits_the_optimizer_and_its_code_runs(make, code):
    torch.manual_seed(0)
    x = torch.randn(100, 8) @ (torch.ones(8, 8) + 0.03 * torch.randn(8, 8))
    model = mlp()
    objective = objective_of(model, (x - x.mean(0)) / x.std(0))
    advice = diagnose(objective, step(model, objective, make(model), 1)).advice
    assert any(code in " ".join(a.code.split()).replace("( ", "(").replace(" )", ")") for a in advice), advice
    for a in advice:
        if a.remedy is not None:
            exec(a.code, {"precond": precond, "torch": torch, "model": model, "inputs": x})


# --- leaving no trace --------------------------------------------------------------------------------------------------------


def test_it_changes_nothing_and_repeats_itself():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
    objective = objective_of(model, torch.randn(40, 1, 8, 8))
    optimizer = step(model, objective, precond.adam(model, inputs=BNP()), 1)
    model[1].eval()
    before = copy.deepcopy(
        (model.state_dict(), optimizer.state_dict(), [m.training for m in model.modules()], torch.get_rng_state())
    )
    grads = [p.grad.clone() for p in model.parameters()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    texts = {str(diagnose(objective, optimizer, samples=500)) for _ in range(2)}
    assert len(texts) == 1
    after = (model.state_dict(), optimizer.state_dict(), [m.training for m in model.modules()], torch.get_rng_state())
    assert alike(after, before)
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    for p, g in zip(model.parameters(), grads, strict=True):
        assert p.grad.equal(g)


def test_hooks_go_when_the_forward_fails():
    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no forward")

    model = nn.Sequential(nn.Linear(8, 8), Fails(8, 2))
    with pytest.raises(RuntimeError, match="no forward"):
        diagnose(objective_of(model, torch.randn(10, 8)))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_samples_are_drawn():
    x = spread_inputs(4000)
    model = nn.Linear(6, 2).double()
    full, drawn = diagnose(objective_of(model, x)).layers[0], diagnose(objective_of(model, x), samples=600).layers[0]
    assert full.used == 4000 and 500 < drawn.used < 700 and drawn.samples == 4000
    assert drawn.spectra.kappa("raw") == pytest.approx(full.spectra.kappa("raw"), rel=0.3)


class Summarized(nn.Module):
    """A projection that is called with all tokens, and with one summary in which the first entry is large."""

    def __init__(self):
        super().__init__()
        self.own = nn.Linear(3, 2)

    def forward(self, x):
        return self.own(x).mean(1) + self.own(x[:, 0].sign() * LARGE)


class Stepped(nn.Module):
    """A cell that is called step by step, with another scale in the first one."""

    def __init__(self):
        super().__init__()
        self.own = nn.GRUCell(3, 2)

    def forward(self, x):
        h = None
        for t in range(x.shape[1]):
            h = self.own(x[:, t] * LARGE if t == 0 else x[:, t], h)
        return h


LARGE = torch.tensor([40.0, 1.0, 1.0], dtype=torch.float64)
UNEVEN = {  # model, shapes of batches, number of samples that are wanted
    "calls of 64 rows and of one": (Summarized, [(1, 64, 3)] * 800, 26000),
    "a large batch, then small ones": (nn.Sequential, [(16000, 3), *[(1, 3)] * 800], 6000),
    "small batches, then a large one": (nn.Sequential, [*[(1, 3)] * 800, (16000, 3)], 6000),
    "a cell, step by step": (Stepped, [(4, 20, 3)] * 120, 3000),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_each_input_is_drawn_with_the_same_probability(case):
    """κ of the drawn inputs against that of all, where those of small calls and batches are much larger than the others."""
    make, shapes, samples = UNEVEN[case]
    torch.manual_seed(0)
    model = (make(nn.Linear(3, 2)) if make is nn.Sequential else make()).double()
    data = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if make is nn.Sequential:
        data = [x.sign() * LARGE if len(x) == 1 else x for x in data]
        few, rows = 800, torch.cat(data)
    elif make is Summarized:
        few, rows = 800, torch.cat([part for x in data for part in (x[0], x[:, 0].sign() * LARGE)])
    else:
        few, rows = 480, torch.cat([part for x in data for part in (x[:, 0].sign() * LARGE, x[:, 1:].flatten(0, 1))])
    objective = Objective(model, lambda out, _: out.square().mean(), [(x, torch.zeros(len(x))) for x in data])
    found = gather(objective, samples, 100)[0][0]
    # λ_max is 40² times the share of large inputs, of which few·samples/N are drawn, give or take four square roots of that.
    drawn = few * samples / len(rows)
    assert found.used == pytest.approx(samples, rel=0.05)
    assert kappa(found.R[0].numpy()) == pytest.approx(kappa(extended(rows.numpy())), rel=4 / drawn**0.5)


def test_of_a_few_one_is_seen():
    (found,), _ = gather(objective_of(nn.Linear(6, 2).double(), spread_inputs(4000)), 1, 100)
    assert found.R[0].isfinite().all() and found.low.any()


def test_recurrent_layers_are_seen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(30, 6, 4, dtype=torch.float64) * torch.logspace(-1, 1, 4)
    objective = Objective(model, nn.functional.mse_loss, [(x, torch.zeros(30, 2, dtype=torch.float64))])
    found = diagnose(objective, precond.whitening(model))
    with torch.no_grad():
        h = model.rnn(x)[0]
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
    inputs = {"rnn.weight_ih_l0": x, "rnn.weight_hh_l0": before, "out": h[:, -1]}
    assert {layer.name: layer.source for layer in found.layers if layer.name in inputs} == {
        "rnn.weight_ih_l0": "data", "rnn.weight_hh_l0": "hidden states", "out": found.layers[-1].source
    }  # fmt: skip
    for layer in found.layers:
        rows = inputs[layer.name].reshape(-1, inputs[layer.name].shape[-1]).numpy()
        np.testing.assert_allclose(layer.spectra.kappa("raw"), kappa(extended(rows)), rtol=1e-8, err_msg=layer.name)
    assert found.undiagnosed == ()


def test_notes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out, self.unused = nn.LSTM(8, 6, proj_size=4, batch_first=True), nn.Linear(4, 2), nn.Linear(3, 3)

        def forward(self, x):
            return self.out(self.rnn(x[:, None])[0])

    model = Net()
    objective = objective_of(model, torch.randn(30, 8))
    notes = " ".join(diagnose(objective, torch.optim.Adam(model.parameters())).notes)
    assert "rnn.weight_hr_l0 is a projection of hidden states" in notes
    assert "unused.weight was not called" in notes and "take a step" in notes and "after 10 steps of a copy" in notes
    assert "more than max_inputs=3" in " ".join(diagnose(objective, max_inputs=3).notes)
    log_of_negative = Objective(nn.Linear(3, 2), lambda out, _: out.sum().sub(1e6).log(), [(torch.ones(4, 3), torch.zeros(4))])
    with pytest.raises(ValueError, match="the loss of batch 0 is nan; look for divergence"):
        diagnose(log_of_negative)
    with torch.no_grad():
        model.out.weight.fill_(math.nan)
        model.rnn.weight_ih_l0.fill_(math.nan)
    with pytest.raises(ValueError, match=r"what out\.weight receives holds inf or NaN; look for divergence"):
        diagnose(objective)
    for bad in ({"samples": 0}, {"max_inputs": -1}, {"curvature": "fisher"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            diagnose(objective, **bad)


def test_numbers_for_json():
    import json

    model = mlp()
    objective = objective_of(model, torch.randn(30, 8))
    found = diagnose(objective, torch.optim.SGD(model.parameters()), curvature="gauss_newton")
    text = json.dumps(found.as_dict())
    assert json.loads(text)["layers"][0]["name"] == "0"


def test_parameters_that_belong_to_no_diagnosed_layer_are_named_where_they_are_many():
    class Tagger(nn.Module):
        def __init__(self, words):
            super().__init__()
            self.table, self.scale, self.head = nn.Embedding(words, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.scale(self.table(x)))

    def found(words):
        torch.manual_seed(0)
        x = torch.randint(words, (60,))
        return diagnose(Objective(Tagger(words), nn.functional.cross_entropy, [(x, x % 3)]))

    large = found(50)
    (line,) = (line for line in large.undiagnosed if "belong to no layer" in line)
    # 400 of the 443 entries, and 16 of the normalization.
    assert line.startswith("table.weight, ") and "94 % of the parameters" in line and "head" not in line
    assert large.share == pytest.approx(27 / 443)
