/* SPDX-License-Identifier: Apache-2.0 */
/* Starts the library when the dynamic linker has loaded it into a program under `cowshed attach`. */
#include "transport/preload/forks.h"
#include "transport/preload/hooks_change.h"
#include "transport/preload/hooks_exec.h"
#include "transport/preload/hooks_look.h"
#include "transport/preload/process.h"
#include "transport/preload/real.h"
#include "transport/preload/config.h"

__attribute__((constructor)) static void start(void)
{
	real_find();
	report_begin();
	change_find();
	look_find();
	exec_find();
	config_read();
	if (!config.active)
		return;
	process_begin();
	forks_watch();
}
