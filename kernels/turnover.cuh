// Free rows take waiting tickets, in the order of the rows; then: does the loop go on?
#pragma once

EITHER void admit(const Solve& s, int row, int ticket) {
    s.ticket[row] = ticket;
    s.phase[row] = FRESH;
    s.status[row] = STATUS_RUNNING;
    s.stage[row] = 0;
    s.clock[row] = s.step[row] = s.taken[row] = s.passes[row] = 0;
    s.error[row] = 1;
    s.reach[row] = 1e308;
    for (int i = 0; i < 4; i++) s.counters[4 * row + i] = 0;
}

// One team for all rows. Whose turn it is depends on the rows' numbers alone, so that a run can be repeated.
EITHER bool turnover(const Team& team, const Solve& s) {
    int next = s.queue[NEXT], running = 0;
    for (int base = 0; base < s.capacity; base += team.threads()) {
        int row = base + team.thread(), free, busy;
        bool idle = row < s.capacity && s.phase[row] == IDLE;
        int ticket = next + team.rank(idle, &free);
        if (idle && ticket < s.queue[COUNT]) admit(s, row, ticket);
        next = next + free < s.queue[COUNT] ? next + free : s.queue[COUNT];
        team.rank(row < s.capacity && s.phase[row] != IDLE, &busy);
        running += busy;
    }
    bool goes_on = running > 0 && s.queue[ITERATIONS] < s.queue[LIMIT];
    team.sync();
    if (team.first()) {
        s.queue[NEXT] = next;
        s.queue[ROWS_RUNNING] = running;
        s.queue[ITERATIONS]++;
        s.queue[GOES_ON] = goes_on;
    }
    return goes_on;
}
