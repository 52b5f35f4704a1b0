# SPDX-License-Identifier: Apache-2.0
"""What fine-tuning gained and what it cost: suites of datasets, protocols, measures and pictures."""

from .corruptions import CORRUPTIONS as CORRUPTIONS
from .corruptions import corrupt as corrupt
from .difficulty import embedding_difficulty as embedding_difficulty
from .difficulty import task_difficulty as task_difficulty
from .difficulty_plot import plot_difficulty as plot_difficulty
from .difficulty_report import ClassDifficulty as ClassDifficulty
from .difficulty_report import TaskDifficulty as TaskDifficulty
from .metrics import Accuracy as Accuracy
from .metrics import BaseNewAccuracy as BaseNewAccuracy
from .metrics import CalibrationError as CalibrationError
from .metrics import EffectiveRobustness as EffectiveRobustness
from .metrics import Forgetting as Forgetting
from .metrics import OODAverage as OODAverage
from .metrics import accuracies as accuracies
from .metrics import expected_calibration_error as expected_calibration_error
from .plots import plot_id_ood as plot_id_ood
from .plots import plot_over_epochs as plot_over_epochs
from .plots import plot_reliability as plot_reliability
from .protocols import base_to_new as base_to_new
from .protocols import few_shot as few_shot
from .protocols import harmonic_mean as harmonic_mean
from .protocols import one_standard_error_rule as one_standard_error_rule
from .report import SetResult as SetResult
from .report import SuiteReport as SuiteReport
from .run import evaluate_suite as evaluate_suite
from .statistics import PairedTest as PairedTest
from .statistics import bootstrap_difference as bootstrap_difference
from .statistics import bootstrap_interval as bootstrap_interval
from .statistics import effective_robustness as effective_robustness
from .statistics import forgetting as forgetting
from .statistics import ood_average as ood_average
from .statistics import paired_test as paired_test
from .suite import RobustnessSuite as RobustnessSuite
from .suite import SuiteSet as SuiteSet
from .suite import shipped_suites as shipped_suites
