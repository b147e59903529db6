# SPDX-License-Identifier: Apache-2.0
"""The cowshed command as another user: as_user.py UID ARGUMENT...

Imports everything before it changes the user, since that user may not be able to read modules.
"""

import sys

from orders import become

import cowshed.service.commands.attach
import cowshed.service.commands.keeping
import cowshed.service.daemon
import cowshed.service.metrics.port
import cowshed.service.reports.render
import cowshed.service.top.command
import cowshed.transport.links.tls
from cowshed.service import cli

if __name__ == "__main__":
    assert cowshed.service.daemon.run
    assert cowshed.service.commands.attach.become
    assert cowshed.service.commands.keeping.run_kept
    assert cowshed.service.metrics.port.MetricsPort
    assert cowshed.service.reports.render.status_view
    assert cowshed.service.top.command.watch
    assert cowshed.transport.links.tls.TlsSession
    become(int(sys.argv.pop(1)))
    cli.main()
