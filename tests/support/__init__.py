"""Helpers of the suite: an engine that is not SGLang, and an oracle that is not our code."""
