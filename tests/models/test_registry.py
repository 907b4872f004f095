import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import avex_serve
from avex_serve.configs import AudioConfig, ModelSpec
from avex_serve.models.base_model import ModelBase
from avex_serve.models.utils import registry
from tests.hub import hub_cache, use_cache
from tests.models.backbones import noise, tiny_spec

# The models that avex 1.4 lists, with their architecture and whether they have a trained classifier.
OFFICIAL = {
    "esp_aves2_eat_all": ("eat_hf", False),
    "esp_aves2_eat_bio": ("eat_hf", False),
    "esp_aves2_effnetb0_all": ("efficientnet", True),
    "esp_aves2_effnetb0_audioset": ("efficientnet", False),
    "esp_aves2_effnetb0_bio": ("efficientnet", True),
    "esp_aves2_naturelm_audio_v1_beats": ("beats", False),
    "esp_aves2_sed_birdcode_beats_encoder": ("beats", False),
    "esp_aves2_sl_beats_all": ("beats", True),
    "esp_aves2_sl_beats_bio": ("beats", True),
    "esp_aves2_sl_eat_all_ssl_all": ("eat_hf", True),
    "esp_aves2_sl_eat_bio_ssl_all": ("eat_hf", True),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_models_say_what_they_are(name):
    model = avex_serve.list_models()[name]
    assert (model["model_type"], model["has_trained_classifier"]) == OFFICIAL[name]
    assert re.fullmatch(r"hf://EarthSpeciesProject/(esp-aves2-[a-z0-9-]+)/\1\.safetensors", model["checkpoint_path"])
    assert model["licence"].startswith("CC-BY-NC-SA-4.0")
    described = avex_serve.describe_model(name)
    assert described["name"] == OFFICIAL[name][0]
    assert described["_metadata"]["checkpoint_path"] == avex_serve.get_checkpoint_path(name)
    labels = described["_metadata"]["class_mapping_path"]
    repository = model["checkpoint_path"].rpartition("/")[0]
    assert labels == (f"{repository}/label_map.json" if OFFICIAL[name][1] else None)
    audio = avex_serve.get_model_spec(name).audio_config
    assert audio.sample_rate == (32000 if "sed" in name else 16000)
    assert audio.target_length_seconds == (5 if "sed" in name else 10)


def test_nothing_else_is_listed():
    assert avex_serve.list_models().keys() == {*OFFICIAL, "avex_demo"}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_models_build(name):
    if OFFICIAL[name][0] not in avex_serve.list_model_classes():
        pytest.skip(f"this version has no architecture {OFFICIAL[name][0]}")
    model = avex_serve.build_model(name, "cpu")
    assert not model.training
    assert avex_serve.list_model_layers(model) == avex_serve.list_model_layers(name)


def test_an_official_classifier_loads_offline_from_a_filled_cache(tmp_path, monkeypatch, caplog):
    name, repository = "esp_aves2_sl_beats_bio", "EarthSpeciesProject/esp-aves2-sl-beats-bio"
    saved = avex_serve.build_model(name, "cpu", num_classes=3)
    weights = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    hub_cache(tmp_path, repository, "esp-aves2-sl-beats-bio.safetensors", lambda path: save_file(weights, path))
    use_cache(monkeypatch, tmp_path)
    assert avex_serve.load_model(name).label_mapping is None
    assert "label_map.json is neither in the hub's cache" in caplog.text
    hub_cache(tmp_path, repository, "label_map.json", lambda path: path.write_text('{"a": 0, "b": 1, "c": 2}'))
    spec = avex_serve.get_model_spec(name)
    loaded = avex_serve.load_model(name)
    assert loaded.label_mapping["index_to_label"] == {0: "a", 1: "b", 2: "c"}
    assert not loaded.training
    assert avex_serve.get_model_spec(name) == spec
    with torch.no_grad():
        assert torch.equal(loaded(noise(1)), saved(noise(1)))


def test_describing_prints_only_if_asked(capsys, clean_registry):
    avex_serve.register_model("mine", tiny_spec(), "weights.pt", "labels.json")
    quiet = avex_serve.describe_model("mine")
    assert capsys.readouterr().out == ""
    assert avex_serve.describe_model("mine", verbose=True) == quiet
    told = capsys.readouterr().out
    for part in ("mine", "beats", "weights.pt", "labels.json", "16000 Hz", "trained"):
        assert part in told
    json.dumps(quiet)
    with pytest.raises(KeyError, match="'nothing' is not registered"):
        avex_serve.describe_model("nothing")


def test_a_registered_model_is_a_copy(clean_registry, caplog):
    spec = tiny_spec()
    avex_serve.register_model("mine", spec)
    avex_serve.get_model_spec("mine").init_config["encoder_layers"] = 9
    avex_serve.load_model("mine")
    avex_serve.list_model_layers("mine")
    assert avex_serve.get_model_spec("mine") == spec
    spec.init_config["encoder_layers"] = 9
    assert avex_serve.get_model_spec("mine") != spec
    assert "replaced" not in caplog.text
    avex_serve.register_model("mine", spec, "weights.pt")
    assert "'mine' is registered already; it is replaced" in caplog.text
    assert avex_serve.get_checkpoint_path("mine") == "weights.pt"
    assert avex_serve.get_model_spec("nothing") is None
    with pytest.raises(KeyError, match="nothing"):
        avex_serve.get_checkpoint_path("nothing")


def test_loading_a_file_registers_nothing(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(json.dumps(tiny_spec().model_dump(exclude_none=True)))
    before = avex_serve.list_models()
    assert registry.load_model_spec_from_yaml(str(path)) == tiny_spec()
    avex_serve.load_model(path)
    assert avex_serve.list_models() == before


def test_layers_are_listed():
    layers = avex_serve.list_model_layers("esp_aves2_sed_birdcode_beats_encoder")
    assert layers["last_layer"] == "backbone.encoder.layers.11.fc2"
    assert layers["layers"] == layers["all"]
    assert len(layers["layers"]) == 13
    assert registry.list_model_layers is avex_serve.list_model_layers
    with pytest.raises(ValueError, match="not found in registry"):
        avex_serve.list_model_layers("nothing")
    with pytest.raises(ValueError, match="must be an instance of ModelBase"):
        avex_serve.list_model_layers(nn.Linear(1, 1))


@pytest.fixture
def classes(clean_registry):
    """Classes registered as avex's documentation shows."""

    @avex_serve.register_model_class
    class Simple(ModelBase):
        name = "my_simple"

        def __init__(self, device, num_classes=2, audio_config=None, extra_config=None, **kwargs):
            super().__init__(device=device, audio_config=audio_config)
            self.width, self.kwargs = (extra_config or {}).get("width", 3), kwargs
            self.project = nn.Linear(self.width, num_classes)

    @avex_serve.register_model_class
    class Nameless(ModelBase):
        def __init__(self, num_classes):
            super().__init__()
            self.head = nn.Linear(2, num_classes)

    return Simple, Nameless


def test_classes_are_registered_by_name(classes, caplog):
    simple, nameless = classes
    assert avex_serve.list_model_classes()[-2:] == ["my_simple", "nameless"]
    assert avex_serve.get_model_class("my_simple") is simple
    assert avex_serve.get_model_class("nameless") is nameless
    assert avex_serve.get_model_class("nothing") is None
    assert avex_serve.register_model_class(simple) is simple
    assert "'my_simple' is registered already" in caplog.text
    with pytest.raises(TypeError, match="is not a model class"):
        avex_serve.register_model_class(nn.Linear(1, 1))


def test_classes_are_given_what_they_name(classes):
    spec = ModelSpec(
        name="my_simple", device="cpu", audio_config=AudioConfig(sample_rate=8000), extra_config={"width": 7}
    )
    model = avex_serve.build_model_from_spec(spec, num_classes=5, anything=1)
    assert (model.width, model.project.out_features, model.kwargs) == (7, 5, {"anything": 1})
    assert model.audio_config.sample_rate == 8000
    assert model.device == "cpu"
    avex_serve.register_model("my_model", spec)
    assert avex_serve.build_model("my_model", device="cpu", num_classes=4).project.out_features == 4
    assert avex_serve.build_model_from_spec(ModelSpec(name="nameless"), "cpu", num_classes=4).head.out_features == 4


def test_fields_of_other_architectures_are_ignored_with_a_warning_unless_they_are_defaults(classes, caplog):
    avex_serve.build_model_from_spec(
        ModelSpec(name="my_simple", efficientnet_variant="b0", eat_norm_mean=-4.268), "cpu"
    )
    assert not caplog.text
    avex_serve.build_model_from_spec(ModelSpec(name="my_simple", use_naturelm=True), "cpu")
    assert "model class 'my_simple' does not accept use_naturelm=True, which is ignored" in caplog.text


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: avex_serve.build_model("nothing", "cpu"), ValueError, "No ModelSpec found for 'nothing'"),
        (
            lambda: avex_serve.build_model_from_spec(ModelSpec(name="nothing"), "cpu"),
            KeyError,
            r"'nothing' is not registered. Available classes: \['beats'",
        ),
    ],
)
def test_what_can_not_be_built(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_keyword_that_the_class_does_not_accept_is_ignored_with_a_warning(caplog):
    model = avex_serve.build_model("avex_demo", "cpu", num_class=3)
    assert model.classifier is None
    assert "has no argument 'num_class', which is ignored; did you mean 'num_classes'?" in caplog.text


def test_the_official_models_can_be_registered_again(clean_registry):
    registry._MODEL_REGISTRY.clear()
    registry._MODEL_CLASSES.clear()
    assert avex_serve.list_models() == {}
    avex_serve.register_model("mine", ModelSpec(name="beats"))
    assert registry._MODEL_REGISTRY["mine"].name == "beats"
    registry.initialize_registry()
    assert {"mine", "avex_demo"} <= set(avex_serve.list_models())
    assert avex_serve.get_model_class("beats") is not None
