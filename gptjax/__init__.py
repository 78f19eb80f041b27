"""gptjax: train GPT-2-style language models in JAX and Flax linen.

    import gptjax

    config = gptjax.load_config("quickstart", {"train.num_steps": 200})
    result = gptjax.train(config, "runs/x")        # .step, .val_loss, .history, .exit_code
    model = gptjax.load("runs/x")                  # or "hf:openai-community/gpt2", "nanogpt:ckpt.pt", ...
    print(model.generate("def main(", max_new_tokens=100))

gptjax/api.py has the names of NAMES with their documentation. It is imported at the first use of one of them, because
the import of JAX takes seconds.
"""

import sys

TYPE_CHECKING = False  # typing has it, too, but importing that takes longer than all the rest here
if TYPE_CHECKING:
    from gptjax.api import Model as Model
    from gptjax.api import TrainResult as TrainResult
    from gptjax.api import load_config as load_config
    from gptjax.api import load_model
    from gptjax.api import prepare as prepare
    from gptjax.config import Config as Config
    from gptjax.errors import UserError as UserError

    load = load_model

__version__ = "0.1.0"  # the only place: pyproject.toml reads it from here, without an import
# Name here -> name in gptjax.api. Those of MODULES are submodules, too, which can be called: gptjax.train(...) is
# gptjax.api.train(...), whatever was imported before, and `from gptjax.train import train` is the function in there.
NAMES = {
    "Config": "Config",
    "Model": "Model",
    "TrainResult": "TrainResult",
    "UserError": "UserError",
    "load": "load_model",
    "load_config": "load_config",
    "prepare": "prepare",
}
MODULES = ("convert", "evaluate", "plan", "train")
__all__ = ["__version__", *NAMES, *MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


ModuleType = type(sys)  # as in types, which is not imported everywhere yet


class CallableModule(ModuleType):
    """A submodule that is called as the function of its name in gptjax.api."""

    def __call__(self, *args: object, **options: object) -> object:
        """Calls the function of gptjax.api."""
        return self._function(*args, **options)

    @property
    def _function(self):
        from gptjax import api

        return getattr(api, self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> object:
        import inspect

        return inspect.signature(self._function)

    @property
    def __doc__(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        # What help() and a notebook's `gptjax.train?` show.
        return self._function.__doc__


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # The import of a submodule ends here.
        if name in MODULES and isinstance(value, ModuleType):
            value.__class__ = CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name in NAMES:
        from gptjax import api

        return getattr(api, NAMES[name])
    if name in MODULES:
        import importlib

        return importlib.import_module(f"gptjax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
