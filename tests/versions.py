"""Lightning's moving average of the weights, which 2.5 does not have."""

import lightning.pytorch.callbacks as callbacks
import pytest

EMAWeightAveraging = getattr(callbacks, "EMAWeightAveraging", None)
needs_moving_average = pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning has it from 2.6 on")
