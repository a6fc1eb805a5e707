"""transformers' Trainer sees the loss that the model gives, and its gradient: both heads, both reductions, accumulated,
smoothed, in one process and in two."""

import copy
import gc
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from two_processes import in_two_processes

from ig_captioner import IGCaptionerForZeroShotImageClassification
from tests.tiny import EOS, PAD, padded, random_images, tiny_model


pytest.importorskip("accelerate")

# one text of one token, and texts whose first token, if left out of the count, would matter
TEXTS = [[5, 6, EOS], [7, EOS], [8, 9, EOS], [EOS], [10, 11, 12, 13, EOS], [14, EOS], [15, 16, EOS], [17, 18, EOS]]
CANDIDATES = [[5, 6, EOS], [7, EOS], [8, 9, 10, EOS]]


class Rows(Dataset):
    """Images with texts and with the index of a candidate text."""

    def __init__(self) -> None:
        self.images = random_images(len(TEXTS))

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "text": TEXTS[index], "candidate": index % len(CANDIDATES)}


def caption_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids, mask = padded([row["text"] for row in rows])
    return {"pixel_values": torch.stack([row["image"] for row in rows]), "labels": ids.masked_fill(mask == 0, -100)}


def choice_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    """For the head that chooses among texts: the candidates, and the index of each image's own."""
    ids, mask = padded(CANDIDATES)
    labels = torch.tensor([row["candidate"] for row in rows])
    images = torch.stack([row["image"] for row in rows])
    return {"pixel_values": images, "input_ids": ids, "attention_mask": mask, "labels": labels}


def arguments(folder, kind=TrainingArguments, **options):
    """One plain step of gradient descent, of the size of the gradient."""
    plain = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
    }
    plain |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    return kind(folder, remove_unused_columns=False, label_names=["labels"], **{**plain, **options})


def make_model(head: str, reduction: str = "token", smoothing: float = 0.0):
    if head == "choice":
        return tiny_model("prefix", IGCaptionerForZeroShotImageClassification)
    return tiny_model("prefix", loss_reduction=reduction, label_smoothing=smoothing)


def expected_loss_and_gradient(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """What the model itself says of the whole batch."""
    model = copy.deepcopy(model).train()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def check_step(before, after, gradient) -> None:
    after = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        expected = gradient.get(name, torch.zeros_like(weight))
        assert torch.allclose(weight - after[name], expected, atol=1e-5), name


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("head", "reduction", "smoothing"),
    [
        ("caption", "token", 0.0),
        ("caption", "sequence", 0.0),
        ("caption", "token", 0.2),
        ("caption", "sequence", 0.2),
        ("choice", "token", 0.0),
    ],
)
def test_loss_and_step_are_those_of_the_whole_batch(head, reduction, smoothing, accumulation, tmp_path):
    model, collate = make_model(head, reduction, smoothing), caption_batch if head == "caption" else choice_batch
    batch = collate(list(Rows()))
    loss, gradient = expected_loss_and_gradient(model, batch)
    trained = copy.deepcopy(model)
    sizes = {"per_device_train_batch_size": 8 // accumulation, "per_device_eval_batch_size": 8}
    options = arguments(tmp_path, gradient_accumulation_steps=accumulation, **sizes)
    trainer = Trainer(trained, options, data_collator=collate, train_dataset=Rows(), eval_dataset=Rows())
    with torch.no_grad():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(model(**batch).loss.item(), abs=1e-5)
    assert trainer.train().training_loss == pytest.approx(loss, abs=1e-5)
    check_step(model, trained, gradient)


@pytest.mark.parametrize(("head", "smoothing"), [("caption", 0.0), ("caption", 0.2), ("choice", 0.0)])
def test_a_short_last_batch_counts_by_its_tokens_or_images(head, smoothing, tmp_path):
    """Of 7 rows in batches of 2, accumulated, the last batch has one."""
    rows, collate = list(Rows())[:7], caption_batch if head == "caption" else choice_batch
    model = make_model(head, smoothing=smoothing)
    loss, gradient = expected_loss_and_gradient(model, collate(rows))
    trained = copy.deepcopy(model)
    options = arguments(tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2)
    trainer = Trainer(trained, options, data_collator=collate, train_dataset=rows)
    assert trainer.train().training_loss == pytest.approx(loss, abs=1e-5)
    check_step(model, trained, gradient)


def test_a_known_example(tmp_path):
    """The labels of the report: transformers counted 5 of 8 tokens, so that the loss was too large by 8 / 5."""
    model = tiny_model()
    labels = torch.tensor([[5, 6, 2], [7, 2, -100], [8, 9, 2]])
    rows = [{"pixel_values": image, "labels": text} for image, text in zip(random_images(3), labels, strict=True)]
    with torch.no_grad():
        outputs = model(pixel_values=random_images(3), labels=labels)
    by_hand = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    assert outputs.loss.item() == pytest.approx(
        1.5 * by_hand.item() + 0.5 * outputs.unconditional_loss.item(), abs=1e-5
    )
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(outputs.loss.item(), abs=1e-5)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_label_smoothing_is_torchs_for_the_conditional_part_in_training_alone(skip_logits):
    model = make_model("caption", smoothing=0.2).train()
    batch = caption_batch(list(Rows()))
    logits = model(**batch, skip_logits=False).logits
    outputs = model(**batch, skip_logits=skip_logits)
    plain, smooth = (
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=share) for share in (0.0, 0.2)
    )
    assert torch.allclose(outputs.loss, 1.5 * smooth + 0.5 * outputs.unconditional_loss, atol=1e-5)
    assert torch.allclose(outputs.captioning_loss, plain, atol=1e-5)
    assert torch.allclose(model.eval()(**batch).loss, 1.5 * plain + 0.5 * outputs.unconditional_loss, atol=1e-5)
    gradients = {}
    for skip in (True, False):
        model = make_model("caption", smoothing=0.2).train()
        model(**batch, skip_logits=skip).loss.backward()
        gradients[skip] = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    assert torch.allclose(gradients[True], gradients[False], atol=1e-5)


# What cannot be right is refused with the reason


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("with_texts", [True, False])
def test_trainers_own_label_smoothing_is_refused_or_told(reduction, with_texts, tmp_path):
    def collate(rows):
        batch = caption_batch(rows)
        ids, mask = padded([row["text"] for row in rows])
        return {**batch, "input_ids": ids, "attention_mask": mask} if with_texts else batch

    options = arguments(tmp_path, label_smoothing_factor=0.1)
    trainer = Trainer(make_model("caption", reduction), options, data_collator=collate, train_dataset=Rows())
    if with_texts and reduction == "sequence":  # nothing tells these calls from others but the texts themselves
        with pytest.warns(UserWarning, match="set label_smoothing in the model's configuration"):
            trainer.train()
    else:
        with pytest.raises(ValueError, match="set label_smoothing in the model's configuration"):
            trainer.train()


def test_label_smoothing_of_trainer_is_right_for_the_choice_among_texts(tmp_path):
    model = make_model("choice")
    options = arguments(tmp_path, label_smoothing_factor=0.2, per_device_eval_batch_size=8)
    trainer = Trainer(model, options, data_collator=choice_batch, eval_dataset=Rows())
    batch = choice_batch(list(Rows()))
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = F.cross_entropy(model(**batch).logits_per_image, labels, label_smoothing=0.2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_padding_that_trainer_counts_is_refused(tmp_path):
    def collate(rows):
        ids, mask = padded([row["text"] for row in rows])
        images = torch.stack([row["image"] for row in rows])
        return {"pixel_values": images, "input_ids": ids, "attention_mask": mask, "labels": ids}

    batch = collate(list(Rows()))
    plain = caption_batch(list(Rows()))
    model = tiny_model()
    with torch.no_grad():
        right = model(**plain).loss.item()
        for left_out in ((), ("attention_mask",), ("attention_mask", "input_ids")):
            given = {name: value for name, value in batch.items() if name not in left_out}
            assert model(**given).loss.item() == pytest.approx(right, abs=1e-5)
    trainer = Trainer(tiny_model(), arguments(tmp_path), data_collator=collate, train_dataset=Rows())
    with pytest.raises(ValueError, match=r"\d+ labels are padding, and Trainer has counted them"):
        trainer.train()


def test_labels_with_a_start_token_are_refused():
    ids = torch.tensor([[1, 5, 6, EOS], [1, 7, EOS, -100]])
    with pytest.raises(ValueError, match="all labels begin with the start token 1"):
        tiny_model()(pixel_values=random_images(2), labels=ids)


# Generation while training


def test_the_reference_caption_is_no_prompt(tmp_path):
    """With `predict_with_generate` all of the batch goes to `generate`, the caption that is to be found included."""
    model = tiny_model()
    rows = list(Rows())
    expected = model.generate(pixel_values=caption_batch(rows)["pixel_values"], max_new_tokens=6).tolist()

    def collate(rows):
        ids, mask = padded([row["text"] for row in rows])
        return {**caption_batch(rows), "input_ids": ids, "attention_mask": mask}

    options = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, per_device_eval_batch_size=8)
    for collator in (caption_batch, collate):
        trainer = Seq2SeqTrainer(model, options, data_collator=collator, eval_dataset=Rows())
        predicted = trainer.predict(Rows(), max_new_tokens=6).predictions
        width = min(predicted.shape[1], len(expected[0]))
        assert predicted[:, :width].tolist() == [row[:width] for row in expected]
        assert set(predicted[:, width:].flatten().tolist()) <= {PAD}


def test_what_stands_before_the_labels_is_a_prompt():
    model = tiny_model()
    questions, answers = [[20, 21], [22]], [[5, EOS], [6, 7, EOS]]
    texts = [question + answer for question, answer in zip(questions, answers, strict=True)]
    ids, mask = padded(texts)
    labels = ids.clone()
    for row, question in enumerate(questions):
        labels[row, : len(question)] = -100
    labels = labels.masked_fill(mask == 0, -100)
    images = random_images(2)
    prompts, prompt_mask = padded([[1, *question] for question in questions], side="left")
    expected = model.generate(pixel_values=images, input_ids=prompts, attention_mask=prompt_mask, max_new_tokens=4)
    for given in ({"attention_mask": mask}, {}):
        actual = model.generate(pixel_values=images, input_ids=ids, labels=labels, max_new_tokens=4, **given)
        assert actual[:, prompts.shape[1] :].tolist() == expected[:, prompts.shape[1] :].tolist()
        assert actual.shape == expected.shape


# Two processes


def step_in_two_processes(reduction: str, folder: Path) -> float:
    """The loss of one step; the first process writes what has become of the weights."""
    options = arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = Trainer(make_model("caption", reduction), options, data_collator=caption_batch, train_dataset=Rows())
    loss = trainer.train().training_loss
    if trainer.is_world_process_zero():
        torch.save(trainer.accelerator.unwrap_model(trainer.model_wrapped).state_dict(), folder / f"{reduction}.pt")
    return loss


def in_one_of_two_processes(folder: Path) -> None:
    """One step of each kind, and their losses in `losses.json`."""
    losses = {reduction: step_in_two_processes(reduction, folder) for reduction in ("token", "sequence")}
    if torch.distributed.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
    gc.collect()  # of DDP, which must not be the last to hold the process group (`training.train.close` says why)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_step_of_one(tmp_path):
    in_two_processes(in_one_of_two_processes, tmp_path)
    losses = json.loads((tmp_path / "losses.json").read_text())
    for reduction in ("token", "sequence"):
        model = make_model("caption", reduction)
        loss, gradient = expected_loss_and_gradient(model, caption_batch(list(Rows())))
        assert losses[reduction] == pytest.approx(loss, abs=1e-5)
        after = make_model("caption", reduction)
        after.load_state_dict(torch.load(tmp_path / f"{reduction}.pt", weights_only=True))
        check_step(model, after, gradient)
