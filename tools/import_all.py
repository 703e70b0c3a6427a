"""Import every module of the package, and what runs its notebooks: the end of an install, and proof that it is whole.

What is imported is compiled and kept, so that nothing which comes later has to do that, whatever the user's environment
says of keeping it.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules

import llava_ta

RUNNERS = ("ipykernel.kernelapp", "nbdev.test", "papermill.cli", "pytest")

if __name__ == "__main__":
    modules = [f"llava_ta.{module.name}" for module in iter_modules(llava_ta.__path__)]
    for name in (*modules, *RUNNERS):
        import_module(name)
    print(f"installed: {len(modules)} modules import on Python {sys.version.split()[0]}")
