"""Promise: a recipe says what is wrong with it: the field, the value, and the nearest thing that would be right."""

from pathlib import Path

import pytest
import yaml

from swim.train.config import Config, ConfigError, TrainSet, load_config, parse_config
from swim.train.system import build_system
from swim.train.systems.swim.config import Config as SwimConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def error_of(*overrides: str) -> str:
    """The message that the tiny recipe gives with these overrides."""
    with pytest.raises(ConfigError) as caught:
        load_config("tiny_cpu", overrides)
    return str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_by_path_and_by_name(recipe):
    assert load_config(recipe) == load_config(recipe.stem) == load_config(recipe.name)
    assert load_config(f"recipes/{recipe.name}") == load_config(recipe)


def test_a_resolved_config_can_be_saved_and_read_again():
    config = load_config("tiny_cpu", ["optim.lr=1e-4", "run.output=somewhere"])
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert parse_config(yaml.safe_load(text), source="saved") == config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optm.lr", "optm: unknown key; did you mean 'optim'?"),
        ("optim.lrr", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("optim.warmup_step", "optim.warmup_step: unknown key; did you mean 'warmup_steps'?"),
        ("data.synth.clip", "data.synth.clip: unknown key; did you mean 'clips'?"),
        ("model.tokenizer.vocabsize", "model.tokenizer.vocabsize: unknown key; did you mean 'vocab_size'?"),
        ("system.layer", "system.layer: unknown key; did you mean 'layers'?"),
        ("system.softmax_scop", "system.softmax_scop: unknown key; did you mean 'softmax_scope'?"),
        ("launch.gpus_per_node_xyz", "launch.gpus_per_node_xyz: unknown key; known keys: ranks"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key, nearest):
    message = error_of(f"{key}=1")
    assert message == f"tiny_cpu: {nearest}"


def test_several_mistakes_are_listed_at_once():
    lines = error_of("optim.lrr=1", "run.stepps=3", "system.layer=1", "system.los=kl").splitlines()
    assert len(lines) == 4
    assert {line.rpartition("; ")[2] for line in lines} == {
        f"did you mean '{name}'?" for name in ("lr", "steps", "layers", "loss")
    }


def test_a_missing_field_is_named():
    data = yaml.safe_load(RECIPES[0].with_name("tiny_cpu.yaml").read_text())
    del data["run"]["steps"], data["system"]["layers"]
    with pytest.raises(ConfigError) as caught:
        parse_config(data, source="mine.yaml")
    assert str(caught.value).splitlines() == [
        "mine.yaml: run.steps: missing; give a value",
        "system.layers: missing; give a value",
    ]
    data["run"]["steps"], data["system"]["layers"] = 1, [1]
    del data["optim"]
    with pytest.raises(ConfigError, match=r"^mine.yaml: optim: missing; give a value$"):
        parse_config(data, source="mine.yaml")


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("run.steps=many", "run.steps: ", "'many'"),
        ("run.steps=0", "run.steps: Input should be greater than 0", "0"),
        ("run.steps=2.5", "run.steps: ", "2.5"),
        ("optim.lr=fast", "optim.lr: ", "'fast'"),
        ("optim.lr=-1", "optim.lr: Input should be greater than 0", "-1"),
        ("optim.schedule=cosin", "optim.schedule: Input should be 'cosine', 'linear' or 'constant'", "'cosin'"),
        ("optim.betas=[0.9]", "optim.betas.1: ", None),
        ("data.train={a: b}", "data.train: ", None),
        ("data.train=[]", "data.train: ", "[]"),
        ("data.workers=-1", "data.workers: ", "-1"),
        ("system.layers=three", "system.layers: ", "'three'"),
        ("system.layers=[]", "system.layers: ", "[]"),
        ("system.loss=miou", "system.loss: Input should be 'kl', 'bce', 'dice', 'focal' or 'iou'", "'miou'"),
        ("system.mask_weight=-0.5", "system.mask_weight: ", "-0.5"),
        ("system=swim", "system: ", "'swim'"),
        ("run=3", "run: ", "3"),
    ],
)
def test_a_wrong_value_is_shown_with_its_field(override, field, value):
    message = error_of(override)
    assert message.startswith(f"tiny_cpu: {field}")
    if value is not None:
        assert message.endswith(f", got {value}")


def test_overrides_are_yaml_at_a_path():
    config = load_config(
        "tiny_cpu",
        [
            "run.name=two words",
            "run.output=/tmp/a=b",
            "run.stop_after=null",
            "data.tasks=[direction, colour]",
            "data.synth=null",
            "model.checkpointing=true",
            "model.config.text_config.num_hidden_layers=2",
            "model.config.text_config.rope_parameters.rope_theta=1e6",
            "launch={ranks: 3}",
            "deepspeed=my/own.json",
            "system.layers=[0, 1]",
        ],
    )
    assert (config.run.name, config.run.output, config.run.stop_after) == ("two words", Path("/tmp/a=b"), None)
    assert config.data.tasks == ["direction", "colour"]
    assert config.data.synth is None
    assert config.model.checkpointing is True
    text = config.model.config["text_config"]
    assert (text["num_hidden_layers"], text["rope_parameters"]["rope_theta"]) == (2, 1_000_000.0)
    assert text["hidden_size"] == 128, "what is not overridden stays"
    assert (config.launch.ranks, config.deepspeed, config.system["layers"]) == (3, "my/own.json", [0, 1])


def test_a_section_that_is_not_in_the_recipe_can_be_set(tmp_path):
    data = yaml.safe_load(RECIPES[0].with_name("tiny_cpu.yaml").read_text())
    del data["launch"]
    data["data"]["synth"] = None
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    config = load_config(path, ["launch.ranks=3", "data.synth.clips=4"])
    assert (config.launch.ranks, config.data.synth.clips) == (3, 4)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", ".0001", "+1e-4", "1.0e-4"])
def test_numbers_are_read_as_people_write_them(tmp_path, text):
    """YAML 1.1 takes 1e-4 for a string; so does PyYAML."""
    config = load_config("tiny_cpu", [f"optim.lr={text}", f"optim.betas=[{text}, 0.9]"])
    assert (config.optim.lr, config.optim.betas) == (1e-4, (1e-4, 0.9))
    free = load_config("tiny_cpu", [f"model.config.text_config.rms_norm_eps={text}"])
    assert free.model.config["text_config"]["rms_norm_eps"] == 1e-4, "no schema turns this one into a number"
    listed = load_config("tiny_cpu", [f"model.config.vision_config.anything=[{text}]"])
    assert listed.model.config["vision_config"]["anything"] == [1e-4]
    recipe = RECIPES[0].with_name("tiny_cpu.yaml").read_text().replace("lr: 2.0e-3", f"lr: {text}")
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.replace("initializer_range: 0.08", f"initializer_range: {text}"))
    config = load_config(path)
    assert config.optim.lr == 1e-4
    assert config.model.config["text_config"]["initializer_range"] == 1e-4


@pytest.mark.parametrize("name", ["7b", "2024-run", "v1.5", "1e", ".", "e5", "3e-4-long"])
def test_names_that_start_like_numbers_stay_names(name):
    assert load_config("tiny_cpu", [f"run.name={name}"]).run.name == name


@pytest.mark.parametrize("override", ["run.steps", "=3", "run.=3", ".steps=3", "run..steps=3", ""])
def test_an_override_of_another_form_is_refused(override):
    assert error_of(override) == f"override {override!r} is not of the form section.key=value"


def test_an_override_inside_a_value_is_refused():
    assert error_of("run.name.first=3") == "override 'run.name.first=3': 'name' is a value, not a section"
    assert error_of("data.train.0=x") == "override 'data.train.0=x': 'train' is a value, not a section"


@pytest.mark.parametrize("value", ["[1, 2", "{a: ", "'open", "a: b: c", "!!python/object:os.system x"])
def test_an_override_that_is_no_yaml_is_refused(value):
    assert error_of(f"run.name={value}").startswith(f"override {f'run.name={value}'!r}: ")


def test_an_unknown_recipe_lists_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"tiny_gpu: no such recipe; give a YAML file or one of: .*\btiny_cpu\b"):
        load_config("tiny_gpu")
    with pytest.raises(ConfigError, match="no such recipe"):
        load_config(tmp_path)


def test_a_file_that_is_no_recipe_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    for text, problem in [
        ("run: [1", "cannot be read as YAML"),
        ("- 1", "holds list, not sections"),
        ("", "holds NoneType"),
        ("run: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"mine.yaml: {problem}"):
            load_config(path)
    path.write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match=r"mine.yaml: cannot be read as YAML"):
        load_config(path)


def test_an_unknown_system_lists_the_known_ones():
    assert error_of("system.name=swimm") == "tiny_cpu: system.name is 'swimm'; known systems: swim"
    assert error_of("system.name=null") == "tiny_cpu: system.name is None; known systems: swim"
    assert error_of("system.name=../swim").startswith("tiny_cpu: system.name is '../swim'")


def test_the_systems_own_checks_are_heard():
    message = error_of("system.text_weight=0", "system.mask_weight=0")
    assert message == "tiny_cpu: system.text_weight and system.mask_weight are both 0: nothing would be trained"


def test_a_model_has_exactly_one_source():
    both = "tiny_cpu: give exactly one of model.path (pretrained) and model.config (random weights)"
    assert error_of("model.path=Qwen/Qwen2.5-VL-7B-Instruct") == both
    assert error_of("model.config=null") == both
    assert error_of("model.tokenizer=null").startswith("tiny_cpu: model.tokenizer belongs to model.config")
    pretrained = ["model.path=some/folder", "model.config=null", "model.tokenizer=null"]
    assert load_config("tiny_cpu", pretrained).model.path == "some/folder"


def test_layers_outside_the_model_are_refused_before_it_is_built():
    for layers, outside in (("[1, 4]", "[4]"), ("[-1]", "[-1]"), ("[0, 7, 9]", "[7, 9]")):
        config = load_config("tiny_cpu", [f"system.layers={layers}"])
        with pytest.raises(ValueError) as caught:
            build_system(config)
        assert str(caught.value) == f"system.layers: {outside} are not layers of this model; it has 0 to 3"


def test_a_freeze_pattern_that_matches_nothing_is_refused():
    system = build_system(load_config("tiny_cpu", ["model.freeze=[visiual]"]))
    with pytest.raises(ValueError, match=r"model.freeze: 'visiual' matches no parameter; names look like 'model\."):
        system.build_model()
    model = build_system(load_config("tiny_cpu", [r"model.freeze=['model\.visual']"])).build_model()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("model.visual")}


def test_every_field_has_a_line_of_documentation():
    def visit(model, path):
        for name, field in model.model_fields.items():
            assert field.description or hasattr(field.annotation, "model_fields"), f"{path}{name}"
            if hasattr(field.annotation, "model_fields"):
                visit(field.annotation, f"{path}{name}.")

    visit(Config, "")
    visit(SwimConfig, "system.")


def test_one_data_folder_needs_no_brackets():
    assert load_config("tiny_cpu", ["data.train=clips"]).data.train == [TrainSet(path=Path("clips"))]


def test_folders_have_their_share():
    train = load_config("tiny_cpu", ["data.train=[a, {path: b, repeat: 2.5}]"]).data.train
    assert train == [TrainSet(path=Path("a")), TrainSet(path=Path("b"), repeat=2.5)]
    assert error_of("data.train=[a, {path: b, repeats: 2}]").endswith("unknown key; did you mean 'repeat'?")
    assert "repeat: Input should be greater than 0, got 0" in error_of("data.train=[a, {path: b, repeat: 0}]")
    assert "data.train: a has no proportion, others have; give it to all or to none" in error_of(
        "data.train=[a, {path: b, proportion: 2}]"
    )
    assert "b has repeat and proportion; give one of them" in error_of(
        "data.train=[{path: b, proportion: 2, repeat: 2}]"
    )


def test_a_pack_has_a_number_of_clips_or_of_tokens():
    recipe = next(path for path in RECIPES if path.stem == "swim_7b")
    assert load_config(recipe).data.clips_per_pack == 1
    by_tokens = ["data.tokens_per_pack=9000", "data.packed=true"]
    data = load_config(recipe, by_tokens).data
    assert (data.clips_per_pack, data.tokens_per_pack) == (None, 9000)
    assert "data.tokens_per_pack 9000 and data.clips_per_pack 3 are both given; set one of them to null" in error_of(
        *by_tokens
    )
    assert error_of("data.tokens_per_pack=9000", "data.clips_per_pack=null").endswith("set data.packed=true")
