"""What shapes have in common: they describe answers, and nothing is made from them."""

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    """Nothing is made from a shape; tests hold every answer to its own."""

    model_config = ConfigDict(use_attribute_docstrings=True)
