"""The sixth set of the pool: its data are what their words say, and its models compute what theirs say."""

import dis
import itertools
import math
import unicodedata

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precond.lab.workloads.pool import POOL
from precond.lab.workloads.pool.final import networks, pictures, readers, tables, texts
from precond.lab.workloads.pool.final.members import NEW, listed_loss, surprise

MEMBERS = {member.name: member for member in POOL}


def test_deliveries_are_of_three_kinds_and_slower_in_the_rush() -> None:
    found = tables.deliveries(5, 6000)
    distance, load, _, hour, weekday, *_ = found.inputs.T
    truck, bike = load > tables.BY_TRUCK, (distance < tables.ON_BIKE[0]) & (load < tables.ON_BIKE[1])
    assert all(0.03 < share < 0.5 for share in (truck.float().mean(), bike.float().mean()))
    pace, van = found.targets[:, 0] - distance.log(), ~truck & ~bike & (distance > 10)
    rush = ((hour - 8).abs() < 1) | ((hour - 17).abs() < 1)
    assert pace[van & rush & (weekday < 5)].median() > pace[van & rush & (weekday >= 5)].median() + 0.1


def test_bodies_keep_the_energy_and_the_momentum_of_their_ellipses() -> None:
    """1/axis = 2/r - v² lies in one of two belts, and e² = 1 - (x × v)²/axis below 1/4; to float32, in which they are drawn."""
    x, y, u, v = tables.orbits(5, 4000).T
    axis = 1 / (2 / (x.square() + y.square()).sqrt() - u.square() - v.square())
    near, far = (axis > 0.9 - 1e-6) & (axis < 1.1 + 1e-6), (axis > 1.8 - 1e-6) & (axis < 2.4 + 1e-6)
    assert (near | far).all() and near.double().mean().item() == pytest.approx(0.5, abs=0.04)
    e = (1 - (x * v - y * u).square() / axis).clamp_min(0).sqrt()
    # Their squares are even.
    assert e.max() <= 0.5 + 1e-6 and e.square().mean().item() == pytest.approx(0.125, abs=0.005)


def test_molecules_are_connected_keep_their_valences_and_have_hueckels_levels() -> None:
    found = tables.molecules(5, 200)
    kinds, bonds = found.inputs.split((3, tables.ATOMS), 2)
    there = kinds.sum(2)
    assert set(there.sum(1).tolist()) == {6, 8, 10} and torch.equal(bonds, bonds.transpose(1, 2))
    assert (bonds.sum(2) <= kinds @ torch.tensor(tables.VALENCES).float()).all()
    reached = torch.linalg.matrix_power(bonds + torch.eye(tables.ATOMS), tables.ATOMS)[:, 0] > 0
    assert torch.equal(reached, there > 0)
    # Butadiene and benzene, of carbon alone: 4 + 0.472 and 8 in all, gaps of 1.236 and 2 (Hückel, 1931).
    graphs = torch.zeros(2, tables.ATOMS, 3 + tables.ATOMS)
    for graph, n, bound in zip(graphs, (4, 6), ([(0, 1), (1, 2), (2, 3)], [(i, (i + 1) % 6) for i in range(6)]), strict=True):
        graph[:n, 0] = 1
        for a, b in bound:
            graph[a, 3 + b] = graph[b, 3 + a] = 1
    energy, gap = tables.hueckel(graphs)
    exact = torch.tensor([2 * 5**0.5 / 4, 8 / 6], dtype=torch.float64)
    torch.testing.assert_close(energy, exact, rtol=1e-10, atol=0)
    torch.testing.assert_close(gap, torch.tensor([5**0.5 - 1, 2.0], dtype=torch.float64), rtol=1e-10, atol=0)


def test_lists_hold_each_song_once_and_their_halves_are_alike() -> None:
    found = tables.playlists(5, 4000)
    assert set(found.inputs.unique().tolist()) == {0.0, 1.0} and not (found.inputs * found.targets).any()
    assert (found.inputs.sum(1) == 16).all() and (found.targets.sum(1) == 16).all()
    # What is seen in other lists together tells the other half of this one better than the half of another.
    together = found.inputs[1000:].T @ found.inputs[1000:]
    scores = F.normalize((found.inputs[:1000] @ together.fill_diagonal_(0)).log1p() - (1 + together.sum(0)).log())
    own, other = ((scores * half).sum(1).mean() for half in (found.targets[:1000], found.targets[:1000].roll(1, 0)))
    assert own > other + 0.05


def test_points_are_on_their_solids() -> None:
    x, y, z = (clouds := pictures.surfaces(torch.Generator().manual_seed(5), 50)).unbind(3)
    r, one = (x.square() + y.square()).sqrt(), torch.ones(50, pictures.POINTS)
    on = {
        "sphere": clouds[0].norm(dim=2), "cube": clouds[1].abs().amax(2) / 0.8, "cylinder": r[2] / 0.7,
        "cone": (0.7 - z[3]) / 1.4 / (r[3] / 0.9),
        "torus": ((r[4] - 0.7).square() + z[4].square()) / 0.09, "octahedron": clouds[5].abs().sum(2) / 1.2, "helix": r[6] / 0.6,
        "two disks": z[7].abs() / 0.5,
    }  # fmt: skip
    assert tuple(on) == pictures.SOLIDS
    for found in on.values():
        torch.testing.assert_close(found, one, rtol=1e-3, atol=0)
    # Turned about the vertical: heights are what they were, up to their sizes.
    disks = pictures.solids(5, 200, noise=0.0)
    heights = disks.inputs[disks.targets == 7, :, 2].abs()
    torch.testing.assert_close(heights, heights[:, :1].expand_as(heights))


def test_automata_obey_their_rules() -> None:
    found = pictures.automata(5, 200, NEW, wrong=0.0)
    cells = (found.inputs[:, 0] > 0).tolist()
    for picture, kind in zip(cells, found.targets.tolist(), strict=True):
        for above, row in itertools.pairwise(picture):
            for i in range(1, len(row) - 1):
                told = int("".join("01"[cell] for cell in above[i - 1 : i + 2]), 2)
                assert row[i] == bool(NEW[kind] >> told & 1)
    wrong = (pictures.automata(5, 200, NEW).inputs != found.inputs).float().mean().item()
    assert wrong == pytest.approx(0.15, abs=0.01)


def test_instructions_are_those_of_dis() -> None:
    source = "def f(x):\n    return x.y + 1\n\nclass A:\n    z = [f(i) for i in range(3)]\n"
    waiting, exact = [compile(source, "a module", "exec")], list[int]()
    while waiting:
        code = waiting.pop()
        exact += [i.opcode for i in dis.get_instructions(code)]
        waiting += [c for c in code.co_consts if hasattr(c, "co_code")]
    assert list(texts.instructions(source)) == exact
    train = texts.bytecode(40)["train"]
    counts = train.inputs.flatten().bincount(minlength=texts.KINDS + 1)
    assert len(counts) == texts.KINDS + 1 and counts.min() > 0 and counts[1] > counts[20] > counts[40]


def test_names_of_characters_are_lines_of_unicode() -> None:
    text = "".join(texts.SIGNS[i] for i in texts.character_names(40, 5)["train"].inputs[:200].flatten().tolist())
    names = text.split("\n")[1:-1]
    assert len(names) > 100 and sum(_is_name(name) for name in names) > 0.95 * len(names)


def _is_name(name: str) -> bool:
    try:
        unicodedata.lookup(name)
    except KeyError:
        return False
    return True


def test_a_stack_computes_the_same_as_the_formula() -> None:
    found = texts.formulas(5, 300)
    values = dict(zip("abcdefgh", (2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0), strict=True))
    seen = set[str]()
    for row, target in zip(found.inputs.tolist(), found.targets.tolist(), strict=True):
        written = "".join(texts.INFIX[i] for i in row[: texts.SOURCE]).rstrip("_")
        assert row[texts.SOURCE :] == [texts.START, *target[:-1]]
        stack = list[float]()
        for sign in "".join(texts.POSTFIX[i] for i in target).rstrip("_"):
            if sign in values:
                stack.append(values[sign])
            else:
                b, a = stack.pop(), stack.pop()
                stack.append({"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else math.inf}[sign])
        try:
            exact = eval(written, {}, values)
        except ZeroDivisionError:
            continue
        assert math.isinf(stack[0]) or stack == [pytest.approx(exact, rel=1e-9)]
        seen.add(written)
    assert len(seen) > 280 and any("(" in written for written in seen)


def test_experts_are_the_two_of_the_largest_gates() -> None:
    torch.manual_seed(0)
    layer, x = networks.Experts(6, 8, 4), torch.randn(5, 6)
    for row, found in zip(x, layer(x), strict=True):
        n = layer.norm(row)
        gates = layer.gate(n)
        best = gates.argsort(descending=True)[:2].tolist()
        share = torch.sigmoid(gates[best[0]] - gates[best[1]])
        torch.testing.assert_close(found, row + share * layer.experts[best[0]](n) + (1 - share) * layer.experts[best[1]](n))


def test_a_flow_is_a_density() -> None:
    """Its logarithm is that of a normal one plus log |det J|, J by autograd; at first it is the normal one."""
    torch.manual_seed(0)
    flow, x = networks.Flow(2, 8, 4).double(), torch.randn(3, 4, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(flow(x), normal.log_prob(x).sum(1, keepdim=True), rtol=1e-6, atol=0)
    torch.testing.assert_close(surprise(flow(x), x), -flow(x).mean())
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)

    def through(row: torch.Tensor) -> torch.Tensor:
        z = row[None]
        for i, coupling in enumerate(flow.couplings):
            z = coupling(z if i % 2 else z[:, flow.order])[0]
        return z[0]

    for row in x:
        jacobian = torch.autograd.functional.jacobian(through, row)
        exact = normal.log_prob(through(row)).sum() + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(flow(row[None])[0, 0], exact, rtol=1e-6, atol=1e-6)


def test_graphs_and_sets_have_no_order() -> None:
    torch.manual_seed(0)
    graphs, order = tables.molecules(5, 3).inputs, torch.randperm(tables.ATOMS)
    model = networks.GatedGraph(3, 8, 3, 2)
    mixed = torch.cat([graphs[:, order, :3], graphs[:, order][:, :, 3 + order]], 2)
    torch.testing.assert_close(model(mixed), model(graphs), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(model(torch.cat([graphs[:, order, :3], graphs[..., 3:]], 2)), model(graphs), atol=1e-5)
    clouds, sets = torch.randn(3, 12, 3), networks.SetTransformer(3, 5, 16, 2, 4)
    torch.testing.assert_close(sets(clouds[:, torch.randperm(12)]), sets(clouds), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sets(clouds + torch.randn(3, 12, 3)), sets(clouds), atol=1e-4)


def test_a_soliton_lacks_nothing_of_the_equation_and_the_field_begins_and_ends_as_it() -> None:
    torch.manual_seed(0)
    points = torch.rand(50, 2, dtype=torch.float64) * torch.tensor([10.0, 2.0]) - torch.tensor([4.0, 0.0])
    lacking = networks.schroedinger(networks.soliton, points)
    torch.testing.assert_close(lacking, torch.zeros_like(lacking), rtol=0, atol=1e-12)
    slower = networks.schroedinger(lambda x, t: networks.soliton(x, 0.5 * t), points)
    assert slower.abs().max() > 0.1
    model = networks.Schroedinger(4, 8).double()
    x, zero = points[:, :1], torch.zeros(50, 1, dtype=torch.float64)
    torch.testing.assert_close(model.field(x, zero), networks.soliton(x, zero))
    for end in (-4.0, 6.0):
        torch.testing.assert_close(model.field(zero + end, points[:, 1:]), networks.soliton(zero + end, zero))


def test_lists_are_scored_by_what_is_to_be_found() -> None:
    scores, found = torch.randn(3, 6), torch.tensor([[1.0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0]])
    each = [F.cross_entropy(row[None].expand(2, -1), where.nonzero()[:, 0]) for row, where in zip(scores, found, strict=True)]
    torch.testing.assert_close(listed_loss(scores, found), torch.stack(each).mean())


def test_dilated_convolutions_look_back_as_far_as_they_say() -> None:
    """Two convolutions of three places in each of three blocks: 2·2·(1 + 2 + 4) places before its own."""
    torch.manual_seed(0)
    model, tokens = readers.DilatedLM(7, 8, 3), torch.randint(7, (64, 40))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 7
    moved = (model(changed) - model(tokens)).abs().amax((0, 1)) > 0
    assert moved.nonzero()[:, 0].tolist() == list(range(4, 4 + 28 + 1))


def test_an_lstm_sees_all_of_the_source_and_of_the_target_what_is_written() -> None:
    torch.manual_seed(0)
    model, signs = readers.AttentiveLSTM(9, 5, 4, 8, 12), torch.randint(5, (2, 10))
    before = model(signs)
    assert before.shape == (2, 5, 6)
    for place in (0, 3):
        changed = signs.clone()
        changed[:, place] += 1
        assert ((model(changed) - before).abs().amax((0, 1)) > 0).all()
    changed = signs.clone()
    changed[:, 4 + 3] = (changed[:, 4 + 3] + 1) % 5
    moved = (model(changed) - before).abs().amax((0, 1))
    assert moved[:3].max() < 1e-6 < moved[3:].min()


def test_the_embedding_of_the_transformer_is_its_head() -> None:
    model = readers.PostNormGPT(7, 6, 8, 1, 2)
    assert model.head.weight is model.embedding.weight and not model.layers[0].norm_first


def test_the_tuned_resnet_keeps_the_convolutions_of_its_first_stage() -> None:
    workload = MEMBERS["ResNet of 12 blocks tuned above its first stage, to other automata"].workload()
    first, second = workload.make(), workload.make()
    still = {name for name, p in first.named_parameters() if not p.requires_grad}
    assert still == {"stem.weight", *(f"stage1.{i}.conv{j}.weight" for i in range(6) for j in (1, 2))}
    others = dict(second.named_parameters())
    assert {name for name, p in first.named_parameters() if not torch.equal(p, others[name])} == {"head.weight", "head.bias"}
    assert len(first.stage1) + len(first.stage2) == 12
