"""The messages of the Open Inference Protocol over gRPC, built at import from the table below.

Names and numbers are those of KServe's ``grpc_predict_v2.proto``. The descriptors live in a pool of their own:
generated code would tie the project to one range of protobuf versions, and clash in any process that also loads
Triton's client, which registers the same names.
"""

from typing import Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from avex_serve.errors import InputError

PACKAGE: Final = "inference"
SERVICE: Final = "inference.GRPCInferenceService"

# message: fields as "[repeated|map] type name = number"; a map's key is a string. Types in capitals are messages
# of the same package, or the enumeration below. Of ModelConfig these are the fields that mean something here.
_TABLE: Final = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live = 1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready = 1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "string name = 1; string version = 2; repeated string extensions = 3",
    "ModelReadyRequest": "string name = 1; string version = 2",
    "ModelReadyResponse": "bool ready = 1",
    "ModelMetadataRequest": "string name = 1; string version = 2",
    "ModelMetadataResponse": """string name = 1; repeated string versions = 2; string platform = 3;
        repeated ModelMetadataResponse.TensorMetadata inputs = 4;
        repeated ModelMetadataResponse.TensorMetadata outputs = 5""",
    "ModelMetadataResponse.TensorMetadata": "string name = 1; string datatype = 2; repeated int64 shape = 3",
    "ModelConfigRequest": "string name = 1; string version = 2",
    "ModelConfigResponse": "ModelConfig config = 1",
    "ModelConfig": """string name = 1; string platform = 2; string backend = 17; int32 max_batch_size = 4;
        repeated ModelInput input = 5; repeated ModelOutput output = 6; map ModelParameter parameters = 14""",
    "ModelInput": "string name = 1; DataType data_type = 2; repeated int64 dims = 4",
    "ModelOutput": "string name = 1; DataType data_type = 2; repeated int64 dims = 3",
    "ModelParameter": "string string_value = 1",
    "RepositoryIndexRequest": "string repository_name = 1; bool ready = 2",
    "RepositoryIndexResponse": "repeated RepositoryIndexResponse.ModelIndex models = 1",
    "RepositoryIndexResponse.ModelIndex": "string name = 1; string version = 2; string state = 3; string reason = 4",
    "RepositoryModelLoadRequest": """string repository_name = 1; string model_name = 2;
        map ModelRepositoryParameter parameters = 3""",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": """string repository_name = 1; string model_name = 2;
        map ModelRepositoryParameter parameters = 3""",
    "RepositoryModelUnloadResponse": "",
    "ModelRepositoryParameter": """bool bool_param = 1; int64 int64_param = 2; string string_param = 3;
        bytes bytes_param = 4""",
    "InferParameter": """bool bool_param = 1; int64 int64_param = 2; string string_param = 3;
        double double_param = 4; uint64 uint64_param = 5""",
    "InferTensorContents": """repeated bool bool_contents = 1; repeated int32 int_contents = 2;
        repeated int64 int64_contents = 3; repeated uint32 uint_contents = 4; repeated uint64 uint64_contents = 5;
        repeated float fp32_contents = 6; repeated double fp64_contents = 7; repeated bytes bytes_contents = 8""",
    "ModelInferRequest": """string model_name = 1; string model_version = 2; string id = 3;
        map InferParameter parameters = 4; repeated ModelInferRequest.InferInputTensor inputs = 5;
        repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6;
        repeated bytes raw_input_contents = 7""",
    "ModelInferRequest.InferInputTensor": """string name = 1; string datatype = 2; repeated int64 shape = 3;
        map InferParameter parameters = 4; InferTensorContents contents = 5""",
    "ModelInferRequest.InferRequestedOutputTensor": "string name = 1; map InferParameter parameters = 2",
    "ModelInferResponse": """string model_name = 1; string model_version = 2; string id = 3;
        map InferParameter parameters = 4; repeated ModelInferResponse.InferOutputTensor outputs = 5;
        repeated bytes raw_output_contents = 6""",
    "ModelInferResponse.InferOutputTensor": """string name = 1; string datatype = 2; repeated int64 shape = 3;
        map InferParameter parameters = 4; InferTensorContents contents = 5""",
}

_ONE_OF: Final = ("InferParameter", "ModelRepositoryParameter")  # their fields are alternatives
_ENUM: Final = "DataType"
_ENUM_VALUES: Final = {"TYPE_INVALID": 0, "TYPE_FP32": 11}  # of Triton's those that are used

_Field = descriptor_pb2.FieldDescriptorProto


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="avex_serve/grpc_predict_v2.proto", package=PACKAGE, syntax="proto3"
    )
    messages: dict[str, descriptor_pb2.DescriptorProto] = {}
    for name, fields in _TABLE.items():  # an outer message stands before its inner ones
        outer, _, inner = name.rpartition(".")
        message = messages[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=name)
        messages[name] = message
        for line in filter(None, fields.split(";")):
            _add_field(message, name, line.split())
    for name in _ONE_OF:
        for field in messages[name].field:
            field.oneof_index = 0
        messages[name].oneof_decl.add(name="parameter_choice")
    enum = file.enum_type.add(name=_ENUM)
    for name, number in _ENUM_VALUES.items():
        enum.value.add(name=name, number=number)
    return file


def _add_field(message: descriptor_pb2.DescriptorProto, full_name: str, words: list[str]) -> None:
    *label, kind, name, _, number = words
    if label == ["map"]:
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add_field(entry, full_name, ["string", "key", "=", "1"])
        _add_field(entry, full_name, [kind, "value", "=", "2"])
        kind = f"{full_name}.{entry.name}"
    field = message.field.add(name=name, number=int(number))
    field.label = _Field.LABEL_REPEATED if label else _Field.LABEL_OPTIONAL
    if kind[0].isupper():
        field.type = _Field.TYPE_ENUM if kind == _ENUM else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"
    else:
        field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())


def message_class(name: str) -> type[Message]:
    """The class of a message, e.g. ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


def decoded(kind: type[Message], data: bytes) -> Message:
    """The message of a kind that came as bytes: gRPC itself would log a traceback where they are none.

    Raises:
        InputError: they are none.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InputError(f"the request is no {kind.DESCRIPTOR.name}") from None
