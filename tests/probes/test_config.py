import pytest
from pydantic import ValidationError

from avex_serve.configs import ProbeConfig
from avex_serve.models.probes import load_probe_config

REQUIRED = {
    "mlp": {"hidden_dims": [8]},
    "lstm": {"lstm_hidden_size": 4, "num_layers": 1},
    "attention": {"num_heads": 2, "attention_dim": 8},
    "transformer": {"num_heads": 2, "attention_dim": 8, "num_layers": 1},
}


def config(**fields):
    return ProbeConfig(**{"target_layers": ["last_layer"], **fields})


def test_defaults_are_those_of_avex():
    assert config().model_dump() == {
        "probe_type": "linear",
        "aggregation": "mean",
        "input_processing": "pooled",
        "target_layers": ["last_layer"],
        "freeze_backbone": True,
        "hidden_dims": None,
        "dropout_rate": 0.1,
        "activation": "relu",
        "num_heads": None,
        "attention_dim": None,
        "num_layers": None,
        "lstm_hidden_size": None,
        "bidirectional": False,
        "max_sequence_length": None,
        "use_positional_encoding": False,
        "target_length": None,
        "online_training": None,
        "extra_config": None,
    }


def test_the_schema_describes_every_field():
    properties = ProbeConfig.model_json_schema()["properties"]
    assert set(properties) == set(ProbeConfig.model_fields)
    assert all(field["description"] for field in properties.values())


@pytest.mark.parametrize("kind", REQUIRED)
def test_each_head_names_the_field_that_is_missing(kind):
    assert config(probe_type=kind, **REQUIRED[kind]).probe_type == kind
    for field in REQUIRED[kind]:
        rest = {name: value for name, value in REQUIRED[kind].items() if name != field}
        with pytest.raises(ValidationError, match=rf"{field} is None, but a {kind} probe needs it; set {field}="):
            config(probe_type=kind, **rest)


def test_an_attention_probe_has_a_default_depth():
    assert config(probe_type="attention", num_heads=4, attention_dim=128).num_layers == 2


def test_sequence_processing_implies_no_aggregation():
    made = config(probe_type="attention", input_processing="sequence", num_heads=4, attention_dim=128)
    assert made.aggregation == "none"
    assert ProbeConfig(**made.model_dump(exclude_unset=True)) == made


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_processing": "sequence"}, r"not compatible with linear probe.*'sequence'; set 'pooled'"),
        ({"probe_type": "mlp", "hidden_dims": [2], "input_processing": "sequence"}, "not compatible with mlp probe"),
        (
            {"probe_type": "lstm", **REQUIRED["lstm"], "input_processing": "sequence", "aggregation": "mean"},
            r"aggregation is 'mean'.*set aggregation='none'",
        ),
        ({"probe_type": "mlp", "hidden_dims": []}, r"hidden_dims is \[\]; expected at least one"),
        ({"probe_type": "mlp", "hidden_dims": [4, 0]}, r"hidden_dims is \[4, 0\]"),
        ({"online_training": False, "freeze_backbone": False}, "online_training is False, but freeze_backbone is"),
        ({"target_layers": [True]}, r"target_layers is \[True\]: a bool is not a layer"),
        ({"target_layers": ("last_layer", False)}, "a bool is not a layer"),
        ({"hidden_dim": 3}, "hidden_dim"),
        ({"activation": "elu"}, "'relu', 'gelu', 'tanh' or 'swish'"),
        ({"dropout_rate": 1.1}, "less than or equal to 1"),
    ],
    ids=str,
)
def test_rules_name_field_value_and_remedy(fields, message):
    with pytest.raises(ValidationError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("fields", "online"),
    [
        ({}, False),
        ({"aggregation": "cls_token"}, False),
        ({"aggregation": "none"}, True),
        ({"freeze_backbone": False}, True),
        ({"aggregation": "none", "online_training": False}, False),
        ({"online_training": True}, True),
    ],
    ids=str,
)
def test_training_mode(fields, online):
    assert config(**fields).get_training_mode() is online


@pytest.mark.parametrize("nested", [False, True])
def test_configurations_from_yaml(tmp_path, nested):
    path = tmp_path / "probe.yml"
    fields = 'probe_type: mlp\ntarget_layers: ["last_layer", -2]\nhidden_dims: [16, 8]\n'
    path.write_text(
        "name: x\nprobe_config:\n" + "".join(f"  {line}\n" for line in fields.splitlines()) if nested else fields
    )
    assert load_probe_config(path) == config(probe_type="mlp", target_layers=["last_layer", -2], hidden_dims=[16, 8])


@pytest.mark.parametrize("text", ["- a\n", "", "probe_config: 3\n", "a: [\n", "probe_type: linear\n"])
def test_yaml_that_is_no_configuration(tmp_path, text):
    path = tmp_path / "probe.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"probe|target_layers"):
        load_probe_config(str(path))
    with pytest.raises(FileNotFoundError):
        load_probe_config(tmp_path / "missing.yml")


def test_a_dump_of_all_fields_sets_nothing():
    config = ProbeConfig(target_layers=["last_layer"], aggregation="none")
    copy = ProbeConfig(**config.model_dump())
    assert "input_processing" not in copy.model_fields_set
    assert ProbeConfig.model_validate_json(config.model_dump_json()) == config
    chosen = ProbeConfig(target_layers=["last_layer"], aggregation="none", input_processing="pooled")
    assert "input_processing" in ProbeConfig(**chosen.model_dump(exclude_unset=True)).model_fields_set
    flat = ProbeConfig(target_layers=["last_layer"], aggregation="none", input_processing="flatten")
    assert "input_processing" in ProbeConfig(**flat.model_dump()).model_fields_set
