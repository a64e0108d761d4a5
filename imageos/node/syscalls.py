"""The system calls that untrusted programs may use: names and numbers.

Any other call fails for them as if it did not exist, also a call of a kernel newer than this list.
"""

from __future__ import annotations

ABIS = ("x86_64", "i386", "aarch64", "arm")  # in the order of the columns
# NAME and its number in each ABI (-: none), or one number for all ABIs (from 424 on). From the kernel:
# arch/x86/entry/syscalls/syscall_{64,32}.tbl, arch/arm/tools/syscall.tbl, include/uapi/asm-generic/unistd.h
# Left out on purpose: inotify and asynchronous I/O (io_setup), which exhaust limits of the whole node; clone3, because
# its flags are in memory, where no filter sees them (libc then uses clone).
_TABLE = """
# files and directories
read 0 3 63 3, write 1 4 64 4, readv 19 145 65 145, writev 20 146 66 146, pread64 17 180 67 180,
pwrite64 18 181 68 181, preadv 295 333 69 361, pwritev 296 334 70 362, preadv2 327 378 286 392,
pwritev2 328 379 287 393, open 2 5 - 5, openat 257 295 56 322, openat2 437, creat 85 8 - 8, close 3 6 57 6,
close_range 436, lseek 8 19 62 19, _llseek - 140 - 140, stat 4 106 - 106, fstat 5 108 80 108, lstat 6 107 - 107,
stat64 - 195 - 195, fstat64 - 197 - 197, lstat64 - 196 - 196, newfstatat 262 - 79 -, fstatat64 - 300 - 327,
statx 332 383 291 397, access 21 33 - 33, faccessat 269 307 48 334, faccessat2 439, statfs 137 99 43 99,
fstatfs 138 100 44 100, statfs64 - 268 - 266, fstatfs64 - 269 - 267, getdents 78 141 - 141,
getdents64 217 220 61 217, readdir - 89 - -, getcwd 79 183 17 183, chdir 80 12 49 12, fchdir 81 133 50 133,
rename 82 38 - 38, renameat 264 302 38 329, renameat2 316 353 276 382, mkdir 83 39 - 39, mkdirat 258 296 34 323,
rmdir 84 40 - 40, link 86 9 - 9, linkat 265 303 37 330, unlink 87 10 - 10, unlinkat 263 301 35 328,
symlink 88 83 - 83, symlinkat 266 304 36 331, readlink 89 85 - 85, readlinkat 267 305 78 332, chmod 90 15 - 15,
fchmod 91 94 52 94, fchmodat 268 306 53 333, chown 92 182 - 182, fchown 93 95 55 95, lchown 94 16 - 16,
chown32 - 212 - 212, fchown32 - 207 - 207, lchown32 - 198 - 198, fchownat 260 298 54 325, umask 95 60 166 60,
mknod 133 14 - 14, mknodat 259 297 33 324, truncate 76 92 45 92, ftruncate 77 93 46 93, truncate64 - 193 - 193,
ftruncate64 - 194 - 194, fallocate 285 324 47 352, utime 132 30 - -, utimes 235 271 - 269,
futimesat 261 299 - 326, utimensat 280 320 88 348, utimensat_time64 - 412 - 412, setxattr 188 226 5 226,
lsetxattr 189 227 6 227, fsetxattr 190 228 7 228, getxattr 191 229 8 229, lgetxattr 192 230 9 230,
fgetxattr 193 231 10 231, listxattr 194 232 11 232, llistxattr 195 233 12 233, flistxattr 196 234 13 234,
removexattr 197 235 14 235, lremovexattr 198 236 15 236, fremovexattr 199 237 16 237, fcntl 72 55 25 55,
fcntl64 - 221 - 221, flock 73 143 32 143, fsync 74 118 82 118, fdatasync 75 148 83 148, sync 162 36 81 36,
syncfs 306 344 267 373, sync_file_range 277 314 84 -, sync_file_range2 - - - 341, readahead 187 225 213 225,
fadvise64 221 250 223 -, fadvise64_64 - 272 - -, arm_fadvise64_64 - - - 270, dup 32 41 23 41, dup2 33 63 - 63,
dup3 292 330 24 358, pipe 22 42 - 42, pipe2 293 331 59 359, splice 275 313 76 340, tee 276 315 77 342,
sendfile 40 187 71 187, sendfile64 - 239 - 239, copy_file_range 326 377 285 391,
name_to_handle_at 303 341 264 370, memfd_create 319 356 279 385, ioctl 16 54 29 54,
# memory
brk 12 45 214 45, mmap 9 90 222 -, mmap2 - 192 - 192, munmap 11 91 215 91, mremap 25 163 216 163,
mprotect 10 125 226 125, madvise 28 219 233 220, msync 26 144 227 144, mincore 27 218 232 219,
mlock 149 150 228 150, mlock2 325 376 284 390, munlock 150 151 229 151, mlockall 151 152 230 152,
munlockall 152 153 231 153, membarrier 324 375 283 389, shmget 29 395 194 307, shmat 30 397 196 305,
shmctl 31 396 195 308, shmdt 67 398 197 306, semget 64 393 190 299, semop 65 - 193 298, semctl 66 394 191 300,
semtimedop 220 - 192 312, semtimedop_time64 - 420 - 420, msgget 68 399 186 303, msgsnd 69 400 189 301,
msgrcv 70 401 188 302, msgctl 71 402 187 304, ipc - 117 - -,
# processes
clone 56 120 220 120, fork 57 2 - 2, vfork 58 190 - 190, execve 59 11 221 11, execveat 322 358 281 387,
exit 60 1 93 1, exit_group 231 252 94 248, wait4 61 114 260 114, waitid 247 284 95 280, waitpid - 7 - -,
kill 62 37 129 37, tkill 200 238 130 238, tgkill 234 270 131 268, pidfd_open 434, pidfd_send_signal 424,
getpid 39 20 172 20, getppid 110 64 173 64, gettid 186 224 178 224, getpgid 121 132 155 132,
getpgrp 111 65 - 65, setpgid 109 57 154 57, getsid 124 147 156 147, setsid 112 66 157 66, getuid 102 24 174 24,
geteuid 107 49 175 49, getgid 104 47 176 47, getegid 108 50 177 50, getresuid 118 165 148 165,
getresgid 120 171 150 171, getgroups 115 80 158 80, setuid 105 23 146 23, setgid 106 46 144 46,
setreuid 113 70 145 70, setregid 114 71 143 71, setresuid 117 164 147 164, setresgid 119 170 149 170,
setgroups 116 81 159 81, setfsuid 122 138 151 138, setfsgid 123 139 152 139, getuid32 - 199 - 199,
geteuid32 - 201 - 201, getgid32 - 200 - 200, getegid32 - 202 - 202, getresuid32 - 209 - 209,
getresgid32 - 211 - 211, getgroups32 - 205 - 205, setuid32 - 213 - 213, setgid32 - 214 - 214,
setreuid32 - 203 - 203, setregid32 - 204 - 204, setresuid32 - 208 - 208, setresgid32 - 210 - 210,
setgroups32 - 206 - 206, setfsuid32 - 215 - 215, setfsgid32 - 216 - 216, capget 125 184 90 184,
capset 126 185 91 185, prctl 157 172 167 172, arch_prctl 158 384 - -, set_thread_area 205 243 - -,
get_thread_area 211 244 - -, set_tls - - - 983045, get_tls - - - 983046, cacheflush - - - 983042,
set_tid_address 218 258 96 256, set_robust_list 273 311 99 338, get_robust_list 274 312 100 339,
rseq 334 386 293 398, futex 202 240 98 240, futex_time64 - 422 - 422, futex_waitv 449,
personality 135 136 92 136, seccomp 317 354 277 383, landlock_create_ruleset 444, landlock_add_rule 445,
landlock_restrict_self 446, getrlimit 97 76 163 -, ugetrlimit - 191 - 191, setrlimit 160 75 164 75,
prlimit64 302 340 261 369, getrusage 98 77 165 77, times 100 43 153 43, sysinfo 99 116 179 116,
uname 63 122 160 122, olduname - 109 - -, oldolduname - 59 - -, getcpu 309 318 168 345,
getrandom 318 355 278 384, restart_syscall 219 0 128 0, nice - 34 - 34, getpriority 140 96 141 96,
setpriority 141 97 140 97, ioprio_get 252 290 31 315, ioprio_set 251 289 30 314, sched_yield 24 158 124 158,
sched_getparam 143 155 121 155, sched_setparam 142 154 118 154, sched_getscheduler 145 157 120 157,
sched_setscheduler 144 156 119 156, sched_get_priority_max 146 159 125 159,
sched_get_priority_min 147 160 126 160, sched_rr_get_interval 148 161 127 161,
sched_rr_get_interval_time64 - 423 - 423, sched_getaffinity 204 242 123 242, sched_setaffinity 203 241 122 241,
sched_getattr 315 352 275 381, sched_setattr 314 351 274 380,
# signals, time, waiting
signal - 48 - -, sigaction - 67 - 67, sigprocmask - 126 - 126, sigpending - 73 - 73, sigsuspend - 72 - 72,
sigreturn - 119 - 119, sgetmask - 68 - -, ssetmask - 69 - -, rt_sigaction 13 174 134 174,
rt_sigprocmask 14 175 135 175, rt_sigpending 127 176 136 176, rt_sigsuspend 130 179 133 179,
rt_sigreturn 15 173 139 173, rt_sigtimedwait 128 177 137 177, rt_sigtimedwait_time64 - 421 - 421,
rt_sigqueueinfo 129 178 138 178, rt_tgsigqueueinfo 297 335 240 363, sigaltstack 131 186 132 186,
pause 34 29 - 29, alarm 37 27 - -, signalfd 282 321 - 349, signalfd4 289 327 74 355, time 201 13 - -,
gettimeofday 96 78 169 78, clock_gettime 228 265 113 263, clock_gettime64 - 403 - 403,
clock_getres 229 266 114 264, clock_getres_time64 - 406 - 406, clock_nanosleep 230 267 115 265,
clock_nanosleep_time64 - 407 - 407, nanosleep 35 162 101 162, getitimer 36 105 102 105,
setitimer 38 104 103 104, timer_create 222 259 107 257, timer_settime 223 260 110 258,
timer_settime64 - 409 - 409, timer_gettime 224 261 108 259, timer_gettime64 - 408 - 408,
timer_getoverrun 225 262 109 260, timer_delete 226 263 111 261, timerfd_create 283 322 85 350,
timerfd_settime 286 325 86 353, timerfd_settime64 - 411 - 411, timerfd_gettime 287 326 87 354,
timerfd_gettime64 - 410 - 410, select 23 82 - -, _newselect - 142 - 142, pselect6 270 308 72 335,
pselect6_time64 - 413 - 413, poll 7 168 - 168, ppoll 271 309 73 336, ppoll_time64 - 414 - 414,
epoll_create 213 254 - 250, epoll_create1 291 329 20 357, epoll_ctl 233 255 21 251, epoll_wait 232 256 - 252,
epoll_pwait 281 319 22 346, epoll_pwait2 441, eventfd 284 323 - 351, eventfd2 290 328 19 356,
# sockets
socket 41 359 198 281, socketpair 53 360 199 288, socketcall - 102 - -, connect 42 362 203 283,
accept 43 - 202 285, accept4 288 364 242 366, bind 49 361 200 282, listen 50 363 201 284,
shutdown 48 373 210 293, getsockname 51 367 204 286, getpeername 52 368 205 287, getsockopt 55 365 209 295,
setsockopt 54 366 208 294, send - - - 289, sendto 44 369 206 290, sendmsg 46 370 211 296,
sendmmsg 307 345 269 374, recv - - - 291, recvfrom 45 371 207 292, recvmsg 47 372 212 297,
recvmmsg 299 337 243 365, recvmmsg_time64 - 417 - 417,
# since Linux 6.6
fchmodat2 452, map_shadow_stack 453, futex_wake 454, futex_wait 455, futex_requeue 456, mseal 462,
setxattrat 463, getxattrat 464, listxattrat 465, removexattrat 466, file_getattr 468,
"""


def numbers(abi: str) -> dict[str, int]:
    """Return name -> number of the allowed calls of `abi`."""
    column = ABIS.index(abi)
    by_name = {}
    for entry in " ".join(line for line in _TABLE.splitlines() if line[:1] != "#").strip(" ,").split(","):
        name, *columns = entry.split()
        number = columns[column] if len(columns) > 1 else columns[0]
        if number != "-":
            by_name[name] = int(number)
    return by_name
