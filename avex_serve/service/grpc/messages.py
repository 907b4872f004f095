"""The messages of the Open Inference Protocol over gRPC.

They are described in ``open_inference.proto``, compiled to the descriptors in ``open_inference.binpb`` and loaded
into a pool of their own. Generated code would tie the project to one range of protobuf versions, and clash in any
process that also loads Triton's client, which registers the same names.
"""

from pathlib import Path
from typing import Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

PACKAGE: Final = "inference"
SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"
DESCRIPTORS: Final = Path(__file__).with_name("open_inference.binpb")  # made by `make proto`

_pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
    _pool.Add(_file)


def message_class(name: str) -> type[Message]:
    """The class of a message, e.g. ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
