"""StaQ for Stable-Baselines3: policy mirror descent with a growing stack of frozen critics."""

from sb3_staq.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, StaQPolicy
from sb3_staq.staq import StaQ

__version__ = "0.2.0.dev0"

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy", "StaQ", "StaQPolicy", "__version__"]
