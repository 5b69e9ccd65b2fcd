"""Config of the toy recipe."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant="tiny"):
  return ConfigDict(
    {
      "recipe": "tests.sweeps.toy_recipe",
      "variant": variant,
      "seed": 0,
      "seeds": (0,),
      "base": {"size": 8, "name": "small", "width": placeholder(int), "other": None},
      "train": {"rate": 0.1, "is_fast": False},
      "arms": {"first": {"beta": 0.1, "mode": "on"}, "second": {"beta": 0.1, "mode": "on"}},
    }
  )
