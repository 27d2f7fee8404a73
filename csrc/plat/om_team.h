/*
 * om_team: the threads that a program computes with, borrowed for a moment.
 *
 * An OpenMP runtime that is in the process already (torch brings one) is found, never loaded. Its team
 * idles while a thread of the program waits for us, so that work shared with it disturbs nobody, where
 * another thread of ours would keep a core that the team spins on.
 */
#ifndef OM_TEAM_H
#define OM_TEAM_H

#include <stdbool.h>

/* Is there one? */
bool om_team_found(void);
/* Run `work(arg)` on all threads of the calling thread's team at once, the caller's among them; returns
 * when all have returned. There is one. Any thread; not after fork. */
void om_team_run(void (*work)(void *arg), void *arg);

#endif
