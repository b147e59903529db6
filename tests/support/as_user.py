# SPDX-License-Identifier: Apache-2.0
"""The cowshed command as another user: as_user.py UID ARGUMENT...

Everything is imported before the change of user, who may not be able to read the interpreter.
"""

import importlib.metadata
import sys

from scripted_guest import become

import cowshed.service.commands.attach
import cowshed.service.daemon
from cowshed.service import cli

if __name__ == "__main__":
    assert cowshed.service.daemon.run
    assert cowshed.service.commands.attach.become
    importlib.metadata.version("cowshed")
    become(int(sys.argv.pop(1)))
    cli.main()
