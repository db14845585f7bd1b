"""Feedback from people: a page where testers chat with the models of open trials and rate them (`duet serve`).

What is here needs the extra `serve` only where it speaks HTTP (`app.py` and what imports it); ratings can be imported,
counted and told without it.
"""
