"""The final set: shards that pretraining reads."""

from dinov2.curate.materialize.config import MaterializeConfig
from dinov2.curate.materialize.stage import materialize

__all__ = ["MaterializeConfig", "materialize"]
