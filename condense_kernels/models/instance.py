"""What a handle hangs on one model, and takes off again."""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any


class Replaced:
    """A method of one instance, by the method of its handle that has the same name. To who looks at it, it is the one
    it replaces. It is copied and pickled with the model; of a bound function pickle would keep the name only."""

    def __init__(self, handle: Any, name: str) -> None:
        self.handle, self.name = handle, name
        self.own = handle.model.__dict__.get(name)  # of the instance, as accelerate's hooks are; else it is the class's
        setattr(handle.model, name, self)

    @property
    def stock(self) -> Callable:
        if self.own is not None:
            return self.own
        model = self.handle.model  # no bound method: torch.compile takes that for model.forward, which is this one
        return functools.partial(getattr(type(model), self.name), model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stock)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.handle.applied:  # what has been put around it since keeps it alive
            return self.stock(*args, **kwargs)
        return getattr(self.handle, self.name)(self.stock, *args, **kwargs)

    def remove(self) -> None:
        of_model = self.handle.model.__dict__
        if of_model.get(self.name) is self:
            del of_model[self.name]
            if self.own is not None:
                of_model[self.name] = self.own


class Turns:
    """Threads go one after the other. A copy has its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def __reduce__(self) -> tuple:
        return Turns, ()
