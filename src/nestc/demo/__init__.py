"""A small trained network with test images, so that a fresh installation can show at once what nestc does."""

from nestc.demo.data import CLASSES, INPUT, labelled_images, model_path
from nestc.demo.run import DEVICES, run
from nestc.demo.text import describe

__all__ = ["CLASSES", "DEVICES", "INPUT", "describe", "labelled_images", "model_path", "run"]
