"""The start-up file, which no setting of pyproject.toml can place; all else stands there."""

from setuptools import setup
from setuptools.command.build_py import build_py

STARTUP_FILES = ["startup/sb3_staq_zoo.pth", "startup/_sb3_staq_hook.py"]


class BuildWithStartupFiles(build_py):
    """``build_py`` that places the start-up hook beside the package, at the root of either kind of wheel."""

    def run(self) -> None:
        """Build the package, then add the start-up files."""
        super().run()
        # Packages of an editable wheel stay where they are; what is really installed goes to its ``install_lib``
        target = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(target)
        for file in STARTUP_FILES:
            self.copy_file(file, target)


setup(cmdclass={"build_py": BuildWithStartupFiles})
