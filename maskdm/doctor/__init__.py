"""`maskdm doctor`: what is left after a crash, what it means, and what helps.

Each theme has a module with a function `check`, which returns `findings`; `holding` (stages' locks) and `processes` are
what the themes share; `command` runs the checks, mends if asked, and prints. Imports neither torch nor an engine.
"""
