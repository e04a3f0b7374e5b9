"""Runs a file's main() as the installed command does, with its bytecode at hand: python3 -S tests/start.py FILE ARGUMENT...

Tests start the agent and the examples some thousand times; as a script, each would be compiled anew at each start.
"""
import sys
from importlib import import_module

sys.argv.pop(0)
folder, _, name = sys.argv[0].rpartition("/")
sys.path[0] = folder
sys.exit(import_module(name[:-len(".py")]).main())
