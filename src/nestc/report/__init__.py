"""A report of a compiled model: what it shows as data, and a page of HTML that shows it and needs nothing else."""

from nestc.report.data import collect
from nestc.report.page import render, write
from nestc.report.schema import AccuracyData, ReportData

__all__ = ["AccuracyData", "ReportData", "collect", "render", "write"]
