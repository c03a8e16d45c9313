"""What the log looks like: lines for people, or objects for programs."""

import datetime
import json
import logging
import os
import sys
from collections.abc import Mapping

from pipeline.errors import PipelineError

VARIABLE = "PIPELINE_LOG"


class JsonLines(logging.Formatter):
    """An object for each line; what a message is made of has names of its own in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Without a line break."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        told = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(record.args if isinstance(record.args, Mapping) else {}),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def begin_log(level: int) -> None:
    """On standard error, in the form that the environment asks for."""
    forms = {"text": logging.Formatter("%(message)s"), "json": JsonLines()}
    wanted = os.environ.get(VARIABLE) or "text"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(forms.get(wanted, forms["text"]))
    logging.basicConfig(level=level, handlers=[handler])
    if wanted not in forms:
        raise PipelineError(f"{VARIABLE}={wanted}: give one of {', '.join(forms)}")
