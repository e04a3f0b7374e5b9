"""What bitbake makes of the recipe: `python yocto.py RECIPE CLASSES NAME=VALUE…` prints its variables as JSON, expanded.

It runs with the Python that has bitbake's own library (PyPI: bitbake-setup), which lacks hashserv, that nothing here needs.  The
classes of OpenEmbedded are not there: those that the recipe inherits are empty files in CLASSES/classes.
"""
import json
import sys
import types

for name in ("hashserv", "hashserv.client"):
    sys.modules[name] = types.ModuleType(name)

import bb.data  # noqa: E402
import bb.event  # noqa: E402
import bb.parse  # noqa: E402

recipe, classes, *settings = sys.argv[1:]
store = bb.data.init()
for item in settings + [f"BBPATH={classes}", f"TOPDIR={classes}", "__bbclasstype=recipe"]:
    key, _, value = item.partition("=")
    store.setVar(key, value)
bb.parse.init_parser(store)
store = bb.parse.handle(recipe, store)[""]
bb.data.expandKeys(store)
print(json.dumps({key: store.getVar(key) for key in store.keys() if isinstance(store.getVar(key, False), str)}))
