"""Names of the events that the package logs, in the attribute ``event`` of a log record.

    logger.warning("Lost the database: %s", why, extra={"event": log_events.DATABASE_LOST})

Monitoring can match these names; the sentences of the log may change.
docs/reference/monitoring.md lists each name with its level, its meaning and what to do.
"""

from __future__ import annotations

# --- The project

APP_MISSING = "app_missing"  # INSTALLED_APPS does not name the app

# --- The database

DATABASE_LOST = "database_lost"  # the connections to a database that was there are broken
DATABASE_UNREACHABLE = "database_unreachable"  # the first connection could not be made
RECEIVING_REFUSED = "receiving_refused"  # the database refuses what receiving needs
DATABASE_BACK = "database_back"  # ends each of the three above
DATABASE_CHANGED = "database_changed"  # NAME in DATABASES has changed
LEASE_EXPIRED = "lease_expired"  # the lease had expired before this process renewed it

# --- Notifications

POLLING_STARTED = "polling_started"  # notifications do not arrive; the process polls
POLLING_ENDED = "polling_ended"  # notifications arrive again
NOTIFICATIONS_MISSING = "notifications_missing"  # the listener does not receive its own ping
ANNOUNCEMENTS_REFUSED = "announcements_refused"  # the server refuses the NOTIFY of a sender
NOTIFICATION_IGNORED = "notification_ignored"  # the layer did not send the notification
MESSAGE_IGNORED = "message_ignored"  # a message for a channel that the process has not made

# --- Other processes

FLUSH_UNCONFIRMED = "flush_unconfirmed"  # a process has not confirmed a flush in time

# --- Messages that are dropped

CHANNEL_FULL = "channel_full"  # a member of a group missed a message
MESSAGE_UNDECODABLE = "message_undecodable"  # a message was skipped

# --- Unexpected errors

TASK_FAILED = "task_failed"  # a task of the layer failed; the attribute `task` names it
TASK_RECOVERED = "task_recovered"  # that task has succeeded again
LISTENING_FAILED = "listening_failed"  # an unexpected error on the listening connection
BACKGROUND_LOOP_FAILED = "background_loop_failed"  # the thread of the background loop ended

# --- Work that failed because of the database, and is done later or by another process

SWEEP_FAILED = "sweep_failed"
MARKED_READ_FAILED = "marked_read_failed"
ANNOUNCEMENT_FAILED = "announcement_failed"
EXPIRED_DELETE_FAILED = "expired_delete_failed"
RECEIVED_DELETE_FAILED = "received_delete_failed"
CLOSE_FAILED = "close_failed"  # by `close()`: the lease was not ended
EARLIER_CLOSE_FAILED = "earlier_close_failed"  # of a client whose `close()` had failed before
EXIT_CLOSE_FAILED = "exit_close_failed"  # at the end of the process

# --- For debugging

SWEPT = "swept"
