"""
Loaded at interpreter start by ``sb3_staq_zoo.pth``, so that RL Zoo3's own commands know ``--algo staq``.

RL Zoo3 offers no plugin mechanism and some of its commands build their argument parser from the table of algorithms,
so the table has to be complete before the command's module runs: right after the import of the package ``rl_zoo3``.
Every Python process pays for this file: it imports nothing, and whatever fails leaves RL Zoo3 as it was.
Set the environment variable ``SB3_STAQ_NO_ZOO=1`` to switch it off.
"""

import os
import sys


class ZooFinder:
    """Meta-path finder that has ``sb3_staq.zoo`` imported after ``rl_zoo3``, and leaves all other imports alone."""

    def find_spec(self, name, path=None, target=None):
        """
        Find RL Zoo3 as others do, and register StaQ once it is loaded.

        :param name: full name of the module being imported
        :param path: where to look for it, None for top-level modules
        :param target: the module to reload, if any
        :return: the spec that the other finders give, with a loader that registers StaQ; None to abstain
        """
        if name != "rl_zoo3":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if hasattr(spec, "loader") and hasattr(spec.loader, "exec_module"):
            self._register_after(spec.loader)
        return spec

    @staticmethod
    def _register_after(loader):
        def exec_module_and_register(module):
            del loader.exec_module
            loader.exec_module(module)
            try:
                import sb3_staq.zoo  # noqa: F401
            except Exception as error:
                import warnings

                warnings.warn(f"StaQ could not be registered with RL Zoo3: {error!r}", stacklevel=2)

        # On the instance: the loader keeps its type and everything else that import tools expect of it
        loader.exec_module = exec_module_and_register


if os.environ.get("SB3_STAQ_NO_ZOO", "0") in ("", "0"):
    sys.meta_path.insert(0, ZooFinder())
