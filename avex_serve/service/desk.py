"""The desk: where both transports hand over the work of a request."""

from collections.abc import Callable
from typing import TypeVar

from anyio import to_thread

from avex_serve.errors import ForbiddenError
from avex_serve.inference.repository import Repository
from avex_serve.scheduling.admission import Admission
from avex_serve.service.settings import ModelControl

Answer = TypeVar("Answer")


class Desk:
    """What HTTP routes and gRPC methods share: the bundles, and the thread that does the work.

    Every answer that takes a model goes through `serve`: what holds for all of them belongs there.
    """

    def __init__(self, repository: Repository, admission: Admission, model_control: ModelControl) -> None:
        self.repository = repository
        self._admission = admission
        self._model_control = model_control

    async def serve(self, work: Callable[[], Answer]) -> Answer:
        """Do the work of a request in a thread, once there is a slot for it."""
        return await self._admission.run(work)

    async def load(self, name: str) -> None:
        """See `Repository.load`; ForbiddenError unless the setting allows it."""
        self.check_control()
        await to_thread.run_sync(self.repository.load, name)

    async def unload(self, name: str) -> None:
        """See `Repository.unload`; ForbiddenError unless the setting allows it."""
        self.check_control()
        await to_thread.run_sync(self.repository.unload, name)

    def check_control(self) -> None:
        """Raise ForbiddenError unless the setting lets clients load and unload models."""
        if self._model_control != "explicit":
            raise ForbiddenError(
                "models are not loaded and unloaded by clients here; AVEX_MODEL_CONTROL=explicit allows it"
            )
