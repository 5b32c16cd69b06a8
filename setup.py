from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

STARTUP_FILES = ["startup/sb3_staq_zoo.pth", "startup/_sb3_staq_hook.py"]


class BuildWithStartupFiles(build_py):
    """``build_py`` that places the start-up hook beside the package, at the root of either kind of wheel."""

    def run(self) -> None:
        super().run()
        # Packages of an editable wheel stay where they are; what is really installed goes to its ``install_lib``
        target = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(target)
        for file in STARTUP_FILES:
            self.copy_file(file, target)


extras = {
    # What RL Zoo3's options -tb, -P, enjoy (on screen) and record_video need
    "zoo": ["tensorboard>=2.9.1", "tqdm", "rich", "moviepy", "gymnasium[classic-control]"],
    "mujoco": ["gymnasium[mujoco]"],
    "minatar": ["minatar>=1.0.15"],
    "atari": ["ale-py", "opencv-python-headless"],
    "box2d": ["gymnasium[box2d]"],
    # `python -m sb3_staq.export model.zip policy.onnx`
    "export": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"],
    # RLiable's bootstrap does not work with pandas 3 yet
    "benchmarks": ["rliable>=1.2", "pandas<3", "tabulate", "matplotlib", "seaborn", "rich", "pyyaml", "filelock"],
    # "client" for addresses ray://
    "ray": ["ray[client]>=2.52"],
}

setup(
    name="sb3-staq",
    version="0.1.0",
    description="StaQ for Stable-Baselines3: policy mirror descent on a growing stack of frozen critics",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The sb3-staq developers",
    license="MIT",
    keywords="reinforcement-learning policy-mirror-descent stable-baselines3 gymnasium pytorch",
    python_requires=">=3.10",
    packages=["sb3_staq", "sb3_staq.hyperparams"],
    package_dir={"sb3_staq.hyperparams": "hyperparams"},
    package_data={"sb3_staq": ["py.typed"], "sb3_staq.hyperparams": ["*.yml"]},
    cmdclass={"build_py": BuildWithStartupFiles},
    install_requires=[
        "stable-baselines3>=2.9,<3.0",
        "sb3-contrib>=2.9,<3.0",
        # The command ``rl_zoo3`` imports the plots whatever it is asked to do
        "rl-zoo3[plots]>=2.9,<3.0",
        # Imported by rl_zoo3.enjoy, but not among its requirements
        "requests",
        "gymnasium>=0.29.1,<2.0",
        "torch>=2.8,<3.0",
    ],
    extras_require={
        **extras,
        "docs": ["sphinx>=7.3", "myst-parser>=3", "furo", "sphinx-copybutton", "linkify-it-py", "matplotlib"],
        "tests": ["pytest>=8", "pytest-xdist", "hypothesis>=6", "ruff", "mypy", "setuptools>=68"],
        "all": sorted({requirement for requirements in extras.values() for requirement in requirements}),
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
