"""Stock `transformers.Trainer` with attention supervision: three calls, no DeepSpeed, nothing of our training loop.

A tiny Qwen2.5-VL with random weights learns which way the objects of rendered clips move, in a minute on one core.
Clips and tokens are made by our data tools; with a pretrained model they come from its processor.

    python examples/hf_trainer.py [steps]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

import swim
from swim.data_tools.synth import synthesise
from swim.train.batch import BatchOptions, make_batch
from swim.train.config import load_config
from swim.train.system import Request, build_system
from swim.train.systems.swim.targets import step_masks


class SupervisedTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # else, for some families, nobody divides by the accumulation steps

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        supervision = inputs.pop("supervision").to(model.device)
        output = model(**inputs, use_cache=False, **supervision.model_kwargs)
        mask_loss = swim.mask_loss(supervision)  # call 3
        if self.state.global_step == 0 and supervision.count:
            swim.assert_supervised(mask_loss, model)
        return (output.loss + mask_loss, output) if return_outputs else output.loss + mask_loss


def collator(model, tools):
    def collate(requests):  # to a padded batch, all questions about a clip in it, with labels and supervision
        rows = [row for request in requests for row in tools.encode(request)[0]]
        masks = [request.sample.masks for request in requests for _ in request.conversations]
        batch = make_batch(rows, tools.encoder, BatchOptions(tools.options.pad_token, shared_prefix=False))
        labels = torch.full_like(batch.inputs["input_ids"], -100)
        for row, (_, encoded, _) in enumerate(rows):
            labels[row, : len(encoded.labels)] = torch.from_numpy(encoded.labels)
        nouns = []
        for noun in batch.nouns:
            row, clip = noun.conversation, batch.clips[noun.conversation]
            steps = [step_masks(noun.object_ids, masks[row], frames, clip.grid[1:]) for frames in clip.frames]
            nouns.append(swim.NounTarget(row, noun.tokens, steps))
        grids = {row: clip.grid for row, clip in enumerate(batch.clips)}  # Qwen's are read off video_grid_thw
        supervision = swim.describe(model, batch.inputs, nouns, layers="last:3", grids=grids)  # call 2
        return {**batch.inputs, "labels": labels, "supervision": supervision}

    return collate


def main(steps=200, clips=400):
    folder = Path(tempfile.mkdtemp())
    system = build_system(load_config("tiny_cpu", ["data.synth=null"]))  # its tokenizer and its random weights
    swim.register_capture(model := system.build_model())  # call 1
    train, held_out = (
        [Request(shards.read(clip), (0, 2, 4)) for clip in range(len(shards.entries))]
        for shards in (synthesise(folder / str(n), clips=n, seed=n) for n in (clips, 16))
    )
    rate = {"learning_rate": 2e-3, "warmup_steps": steps // 8, "lr_scheduler_type": "cosine", "max_steps": steps}
    plain = {"remove_unused_columns": False, "report_to": [], "save_strategy": "no", "logging_steps": 20}
    arguments = TrainingArguments(str(folder / "out"), per_device_train_batch_size=4, use_cpu=True, **rate, **plain)
    SupervisedTrainer(model, arguments, collator(model, system.collator), train_dataset=train).train()
    nouns = [noun for request in held_out for line in system.predict(model.eval(), request) for noun in line["nouns"]]
    shown = [step for noun in nouns for step in zip(noun["map"], noun["coverage"]) if step[1] and np.any(step[1])]
    pointing = np.mean([np.ravel(target)[np.argmax(found)] > 0 for found, target in shown])
    print(f"pointing on held-out clips: {pointing:.3f} (share of steps whose map peaks on the object)")
    return pointing


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
