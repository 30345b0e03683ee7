"""Studies: arms that run over several seeds at searched learning rates, and their tables."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


class _Callable(ModuleType):
    """Lets `fl_taskarith.study(...)` run a study beside the modules of this subpackage."""

    def __call__(self, *files: Any, **settings: Any) -> "pandas.DataFrame":
        from fl_taskarith.study.run_files import study

        return study(*files, **settings)


sys.modules[__name__].__class__ = _Callable
