"""Hugging Face's Trainer on a small BERT: the optimizer itself, or its class, or second gradients."""

from __future__ import annotations

import pickle

import pytest
import torch

import precond
from integrations.table import RECIPES, check_state, loop

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make integrations")
pytest.importorskip("accelerate", reason="Accelerate is not installed: make integrations")

from precond.integrations.transformers import Trainer  # noqa: E402

each = pytest.mark.parametrize("recipe", RECIPES)
CLASSES = {
    "adamw": (precond.AdamW, {"lr": 0.01}),
    "auto": (precond.optim.Auto, {"lr": 0.01}),
    "muon": (precond.optim.Muon, {"lr": 0.01}),
    "soap": (precond.optim.SOAP, {"lr": 0.01}),
    "whitening": (precond.optim.Whitening, {"lr": 0.01}),
    "adam(inputs=BNP())": (precond.Adam, {"lr": 0.01, "inputs": precond.BNP()}),
    "SAM in z": (precond.AdamW, {"lr": 0.01, "regularizers": [precond.SAM(0.05)]}),
}


def bert(dropout=0.0):
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, num_labels=3,
        max_position_embeddings=8, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def data(count=16):
    generator = torch.Generator().manual_seed(2)
    return [
        {"input_ids": torch.randint(20, (6,), generator=generator), "labels": torch.randint(3, (), generator=generator)}
        for _ in range(count)
    ]


def arguments(path, **options):
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", **options}
    return transformers.TrainingArguments(
        output_dir=str(path), report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip


def plain(recipe, accumulate=1, clip=1.0, **options):
    """The trainer's loop written out: batches of 4, accumulated, with its linear schedule."""
    model = bert()
    model.train()
    optimizer = RECIPES[recipe](model)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, 4)
    rows = data() * accumulate
    batches = [transformers.default_data_collator(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    # The Trainer leaves scaling to models whose forward takes further keywords, and this one does not scale: losses are added.
    loop(model, optimizer, batches, accumulate, clip, scheduler, loss=lambda m, b: m(**b).loss * accumulate, **options)
    return model, optimizer


def check_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        # float32: the trainer collates, accumulates and clips by other operations.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def trainer_of(recipe):
    return Trainer if "SAM" in recipe else transformers.Trainer


def inside(trainer):
    optimizer = trainer.optimizer
    while not isinstance(optimizer, precond.PreconditionedGD):
        optimizer = optimizer.optimizer
    return optimizer


@each
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_optimizer_itself(recipe, accumulate, tmp_path):
    """One changed line; SAM wants the Trainer of integrations. Clipping and the schedule are the trainer's."""
    model = bert()
    trainer = trainer_of(recipe)(
        model=model, args=arguments(tmp_path, gradient_accumulation_steps=accumulate), train_dataset=data() * accumulate,
        optimizers=(RECIPES[recipe](model), None),
    )  # fmt: skip
    trainer.train()
    other, reference = plain(recipe, accumulate)
    check_same(model, other)
    assert [g["lr"] for g in inside(trainer).param_groups] == [g["lr"] for g in reference.param_groups]


@each
def test_the_class(recipe, tmp_path):
    """With the model in the keywords, or with the Trainer of integrations, which passes it along with its own groups."""
    cls, options = CLASSES[recipe]
    assert issubclass(cls, torch.optim.Optimizer) and pickle.loads(pickle.dumps(cls)) is cls
    model = bert()
    trainer = trainer_of(recipe)(
        model=model, args=arguments(tmp_path), train_dataset=data(), optimizer_cls_and_kwargs=(cls, {"model": model, **options})
    )
    trainer.train()
    other, _ = plain(recipe)
    check_same(model, other)
    assert type(inside(trainer)) is cls

    model = bert()
    trainer = Trainer(
        model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=data(), optimizer_cls_and_kwargs=(cls, options)
    )
    trainer.train()
    decays = {name: g["weight_decay"] for g in inside(trainer).param_groups for name in g["param_names"]}
    assert decays["classifier.weight"] == 0.1 and decays["classifier.bias"] == 0.0
    assert inside(trainer).last.gradients == (2 if "SAM" in recipe else 1)


@each
def test_the_class_with_parameters_alone(recipe, tmp_path):
    """As torch.optim's: works, or says in its first words that the model is wanted."""
    cls, options = CLASSES[recipe]
    trainer = trainer_of(recipe)(
        model=bert(), args=arguments(tmp_path), train_dataset=data(), optimizer_cls_and_kwargs=(cls, dict(options))
    )
    if trainer_of(recipe) is Trainer or not RECIPES[recipe](bert()).observes:
        trainer.train()
    else:
        with pytest.raises(TypeError) as caught:
            trainer.train()
        assert "pass the model itself" in str(caught.value)[:80]


@each
def test_bfloat16(recipe, tmp_path):
    model = bert()
    trainer = trainer_of(recipe)(
        model=model, args=arguments(tmp_path, bf16=True), train_dataset=data(), optimizers=(RECIPES[recipe](model), None)
    )
    trainer.train()
    other, _ = plain(recipe, autocast=torch.bfloat16)
    check_same(model, other)


@each
def test_resuming(recipe, tmp_path):
    ends = []
    for resumed in (False, True):
        model = bert()
        trainer = trainer_of(recipe)(
            model=model, args=arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=data(),
            optimizers=(RECIPES[recipe](model), None),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        ends.append((model, inside(trainer)))
    (whole, one), (again, other) = ends
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    check_state(one, other)


def test_sam_under_the_plain_trainer_is_refused(tmp_path):
    model = bert()
    trainer = transformers.Trainer(
        model=model, args=arguments(tmp_path), train_dataset=data(), optimizers=(RECIPES["SAM in z"](model), None)
    )
    with pytest.raises(RuntimeError, match="SAM needs a second gradient"):
        trainer.train()


def test_differences_of_clipped_gradients_are_refused(tmp_path):
    def trainer(max_grad_norm, **more):
        model = bert()
        optimizer = precond.adamw(model, regularizers=[precond.GradientNorm(0.01)], **more)
        arguments_ = arguments(tmp_path, max_grad_norm=max_grad_norm)
        return Trainer(model=model, args=arguments_, train_dataset=data(), optimizers=(optimizer, None))

    with pytest.raises(ValueError, match="set max_grad_norm=0 in TrainingArguments"):
        trainer(1.0).train()
    trainer(0.0, max_norm=1.0).train()


def test_second_passes_see_the_same_dropout_masks(tmp_path):
    """SAM of radius almost zero is no SAM, if both passes see the same masks."""
    ends = []
    for rho in (None, 1e-12):
        model = bert(dropout=0.3)
        penalties = [] if rho is None else [precond.SAM(rho)]
        # statistics_from: as without SAM, so that nothing else differs
        optimizer = precond.adamw(model, lr=0.01, regularizers=penalties, statistics_from="loss")
        options = {"gradient_accumulation_steps": 2, "seed": 5}
        Trainer(
            model=model, args=arguments(tmp_path, **options), train_dataset=data(32), optimizers=(optimizer, None)
        ).train()  # fmt: skip
        ends.append(model)
    check_same(*ends)
