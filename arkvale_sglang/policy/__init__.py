"""Decisions without side effects: which pages a row must attend, which rows fit together."""
