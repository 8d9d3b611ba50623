"""What a distillation run is, as plain data: teachers, student, data, optimisation.

A run is described by a YAML file. It is read strictly: an unknown key is an error that names the nearest known ones, so
that a misspelt setting can never be ignored.
"""

from amradio.distill.config.data import DataConfig, SourceConfig
from amradio.distill.config.reading import config_names, load_config, parse_config, parse_strictly
from amradio.distill.config.run import DistillConfig, digest
from amradio.distill.config.student import StudentConfig
from amradio.distill.config.teachers import FeatureTarget, HeadSizes, SummaryTarget, TeacherConfig, TeacherShape
from amradio.distill.config.training import HookConfig, OptimizerConfig, PartitionConfig, RunConfig, ScheduleConfig

__all__ = [
    "DataConfig",
    "DistillConfig",
    "FeatureTarget",
    "HeadSizes",
    "HookConfig",
    "OptimizerConfig",
    "PartitionConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StudentConfig",
    "SummaryTarget",
    "TeacherConfig",
    "TeacherShape",
    "config_names",
    "digest",
    "load_config",
    "parse_config",
    "parse_strictly",
]
