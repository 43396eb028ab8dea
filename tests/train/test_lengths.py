"""Promise: what the plan says a pack has is what its batch has, for every family, without a frame being decoded."""

from pathlib import Path

import pytest
from tiny import family_config, make_data, tiny_config

from swim.data_tools.mixture import PlanError
from swim.data_tools.plan import PlanState
from swim.data_tools.records import Conversation, Record, Turn
from swim.data_tools.shards import ShardSet, ShardWriter
from swim.data_tools.video import VideoError
from swim.train.config import ConfigError
from swim.train.lengths import Cost, count_text
from swim.train.loader import Loader, Order
from swim.train.system import build_system
from swim.train.tokenizer import train_tokenizer

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"]


def ask(text: str, *, system: str | None = None, **fields) -> Conversation:
    first = [Turn(role="system", text=system)] if system else []
    turns = [*first, Turn(role="user", text=text), Turn(role="assistant", text="yes")]
    return Conversation(task="test", turns=turns, **fields)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Clips of several sizes and lengths with many questions, also unusable ones and such behind another system turn;
    text alone; a slow clip, and one that is no video."""
    folder = tmp_path_factory.mktemp("data")
    sources = [make_data(folder / f"source{size}", clips=3, seed=size) for size in (1, 2)]
    with ShardWriter(folder / "clips") as writer:
        for number, sample in enumerate(source.read(i) for source in sources for i in range(3)):
            said = [
                *sample.record.conversations,
                ask("ends <|im_end|> here ?"),
                ask("what now ?", system="be short"),
                ask("and now ?", system="be short"),
                ask("when ?", span=(0, 3)),
                *[ask("is it " + "very " * number + "round ?")] * number,
            ]
            # 8 frames in 1, 1.6 or 2.7 seconds, so that a rate gives clips different numbers of frames.
            media = sample.record.media[0].model_copy(update={"fps": (8, 5, 3)[number % 3]})
            record = sample.record.model_copy(update={"conversations": said, "media": [media]})
            writer.write(f"clip{number}", record, sample.masks, {"mp4": sample.media()})
        # Five seconds a frame: its time has a digit more or less with the frame that has the mask.
        slow = record.model_copy(update={"media": [record.media[0].model_copy(update={"fps": 0.2})]})
        masks = {name: {0: frames.get(0)} for name, frames in sample.masks.items()}
        writer.write("slow", slow, masks, {"mp4": sample.media()})
        media = [record.media[0].model_copy(update={"kind": "frames"})]
        writer.write("odd", record.model_copy(update={"media": media}), sample.masks, {"mp4": sample.media()})
    with ShardWriter(folder / "text") as writer:
        for number in range(7):
            said = [ask("is a circle round ?"), ask("why " * (20 + 3 * number))][: 1 + number % 2]
            record = Record(source="t", license="CC0-1.0", media=[], objects=[], conversations=said)
            writer.write(f"text{number}", record, {}, {})
    return [folder / "clips", folder / "text"]


def packed(folders: list[Path], tmp_path: Path, model_type: str, *overrides: str, tokens: int):
    train = f"data.train=[{folders[0]}, {{path: {folders[1]}, repeat: 1.5}}]"
    by_tokens = [
        train,
        "data.tasks=null",
        "data.clips_per_pack=null",
        f"data.tokens_per_pack={tokens}",
        "data.packed=true",
    ]
    return family_config(folders[0], model_type, *by_tokens, f"run.output={tmp_path}", *overrides)


AT_A_RATE = [
    *("data.frame_sampling=fps", "data.fps=2.6", "data.min_frames=1", "data.num_frames=6"),
    *("data.clip_pixels=20000", "data.min_pixels=784"),
]


@pytest.mark.parametrize(
    ("shared", "sampling"), [("true", []), ("false", []), ("true", AT_A_RATE)], ids=["shared", "apart", "at a rate"]
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_pack_has_the_tokens_that_its_batch_has(folders, tmp_path, model_type, shared, sampling):
    overrides = [f"data.shared_prefix={shared}", "data.packs_per_step=3", *sampling]
    config = packed(folders, tmp_path, model_type, *overrides, tokens=500)
    if sampling and model_type == "llava_onevision":
        with pytest.raises(ConfigError, match=r"different numbers of frames, .*set data.clips_per_pack=1"):
            build_system(config)
        return
    system = build_system(config)
    order = Order(config, system)
    plan = order.plan(0)
    steps = list(Loader(order, system.collator).steps(0, plan.num_steps))
    found = [batch.num_tokens for step in steps for batch in step][: plan.num_packs]
    assert found == plan.tokens.tolist()
    assert max(found) <= 500
    assert len(set(found)) > 3
    if sampling:
        clips = [clip for step in steps for batch in step for clip in batch.clips if clip and clip.key]
        assert {sum(map(len, clip.frames)) for clip in clips} == {2, 4, 6}
        assert {clip.grid[0] for clip in clips} == ({2, 4, 6} if model_type == "internvl" else {1, 2, 3})
        if model_type != "internvl":
            assert len({clip.grid[1:] for clip in clips}) > 1, "fewer frames of a clip may have more pixels"
    if shared == "true":
        pieces = [unit.clip for unit in plan.units() if unit.dataset == 0]
        assert len(set(pieces)) == 8


def test_the_longest_conversation_is_the_least_budget(folders, tmp_path):
    def order(tokens: int) -> Order:
        config = packed(folders, tmp_path, "qwen2_5_vl", tokens=tokens)
        return Order(config, build_system(config))

    with pytest.raises(PlanError, match=r"#\d+ has \d+ tokens") as caught:
        order(60)
    needed = int(str(caught.value).split("has ")[1].split()[0])
    assert order(needed).plan(0).tokens.max() == needed
    with pytest.raises(PlanError, match=rf"has {needed} tokens"):
        order(needed - 1)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_grid_follows_from_the_size_of_frames(model_type, tmp_path):
    import numpy as np

    family = build_system(family_config(tmp_path, model_type)).collator.encoder.family
    for frames, height, width in ((1, 40, 90), (5, 112, 112), (8, 300, 200), (3, 15, 2800)):
        limits = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 20}
        _, grid = family.pixels(np.zeros((frames, height, width, 3), np.uint8), **limits)
        assert family.grid(frames, (height, width), **limits) == grid
    if "qwen" in model_type:
        with pytest.raises(VideoError, match="aspect ratio beyond 200"):
            family.grid(2, (1, 300), **limits)


def test_text_is_counted_once_for_all_pixel_budgets(folders, tmp_path, capsys):
    def tokens(*overrides: str, kind: str = "qwen2_5_vl"):
        config = packed(folders, tmp_path, kind, *overrides, tokens=2000)
        Order(config, build_system(config))
        return capsys.readouterr().out.count("counting the tokens")

    assert tokens() == 2
    assert tokens() == 0
    assert tokens("data.max_pixels=9000", "data.min_pixels=3136", "data.frame_sampling=uniform", "run.seed=4") == 0
    assert tokens("data.num_frames=6") == 2
    assert tokens("model.tokenizer.vocab_size=300") == 2
    assert tokens(kind="qwen3_vl") == 2
    assert tokens("data.frame_sampling=uniform", kind="qwen3_vl") == 2, "its text names the sampled frames' times"
    assert tokens("data.frame_sampling=fps") == 2, "a family may say something for every frame"
    assert tokens("data.frame_sampling=fps", "data.fps=1") == 2
    assert tokens("data.frame_sampling=fps", "data.fps=1", "data.clip_pixels=9000") == 0
    assert len(list((tmp_path / ".cache").glob("tokens_*"))) == 14


def test_a_changed_tokenizer_or_pixel_budget_is_refused_by_name(folders, tmp_path):
    config = packed(folders, tmp_path, "qwen2_5_vl", tokens=2000)
    state = Order(config, build_system(config)).state(1)
    assert state == PlanState(1, *(getattr(state, name) for name in ("epoch", "step", "plan_digest", "identity")))
    for override, message in (
        ("model.tokenizer.vocab_size=300", "the tokenizer, its chat template or the model family is another"),
        ("data.max_pixels=3136", r"data.train\[0\] \(.*clips\) has other numbers of tokens"),
    ):
        changed = packed(folders, tmp_path, "qwen2_5_vl", override, "data.min_pixels=3136", tokens=2000)
        with pytest.raises(PlanError, match=message):
            Order(changed, build_system(changed)).resume(state)


def test_a_budget_that_enlarges_stored_frames_is_refused(folders, tmp_path):
    limits = ["data.min_pixels=16000", "data.max_pixels=20000"]
    problem = (
        r"min_pixels 16000 enlarges the frames of 8 of 8 clips, the smallest of 112x112 pixels.* Lower it to 12544"
    )
    with pytest.raises(PlanError, match=problem):
        order_of(packed(folders, tmp_path, "qwen2_5_vl", *limits, tokens=2000))
    order_of(packed(folders, tmp_path, "qwen2_5_vl", *limits, "data.upscale=true", tokens=2000))
    order_of(packed(folders, tmp_path, "internvl", *limits, tokens=2000))  # it stretches all frames to one size


def order_of(config) -> Order:
    return Order(config, build_system(config))


def test_an_unreadable_record_counts_nothing(tmp_path):
    shards = make_data(tmp_path / "clips", clips=3)
    entry = shards.entries[1]
    with (tmp_path / "clips" / entry.shard).open("r+b") as file:
        file.seek(entry.members["json"][0] + 3)
        file.write(b"\xff")
    system = build_system(tiny_config(tmp_path / "clips"))
    counts = count_text(ShardSet(tmp_path / "clips"), system.collator)
    first, last = len(shards.entries[0].conversations), len(entry.conversations)
    assert not counts.tokens[first : first + last].any()
    assert counts.tokens[:first].all()
    assert counts.tokens[first + last :].all()


def test_costs_are_those_of_the_published_sizes():
    """Qwen2.5-VL-7B: 6.5e9 parameters in the text model's layers, 0.63e9 in the vision tower's."""
    from transformers import AutoConfig

    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={**text, "num_attention_heads": 28, "num_key_value_heads": 4},
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420},
    )
    cost = Cost(config)
    assert cost.linear == pytest.approx(2 * 6.5e9, rel=0.01)
    assert cost.pair == 4 * 28 * 3584
    # Two matrices in the tower's MLP are counted, its gate is the third.
    assert 2 * 0.45e9 < cost.patch < 2 * 0.66e9
    assert cost.vision((2, 3, 5)) == 2 * 60 * (cost.patch + 60 * cost.patch_pair)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_costs(model_type, tmp_path):
    system = build_system(family_config(tmp_path, model_type))
    cost = Cost(system.model_config)
    model = system.build_model()
    layers = sum(p.numel() for n, p in model.named_parameters() if "language_model.layers" in n and p.ndim == 2)
    assert cost.linear == 2 * layers
    grid = system.collator.encoder.family.dummy().grid
    assert 0 < cost.vision(grid) < cost.vision((2, *grid[1:]))


def test_one_tokenizer_is_one_fingerprint():
    config = tiny_config(Path("unused")).model.tokenizer
    one, two = (train_tokenizer(config).backend_tokenizer.to_str() for _ in range(2))
    assert one == two
