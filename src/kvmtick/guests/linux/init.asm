; init - the first process of the small initramfs: mounts /proc and /sys, then runs commands from
; /script or from the console. A static program for x86-64 Linux, written as a flat ELF file.
;
; Commands stand in the table `commands`, one entry each; `help` prints it. A handler is called with
; RSI = what follows the command on its line, a NUL-terminated string without leading blanks.
;
; Output is gathered in `out` and written when a command is done, in one write(): what a snapshot
; read is not disturbed by its own printing. Input is read byte by byte, so that the line after
; `sh` belongs to the shell; echo and line editing are the tty's.
;
; As process 1 it mounts, and switches the machine off in the end. As any other process, it leaves
; the machine alone, takes its script from the first argument, and exits: for trying it anywhere.
;
; R12 = end of the output gathered; R13 = descriptor commands are read from; R14 = 1 as process 1.
; Routines keep these, RBX and RBP; a system call changes RAX, RCX and R11.

        bits    64

CODE            equ 0x400000
DATA            equ 0x10000000
OUT_BYTES       equ 0x100000
TEXT_BYTES      equ 0x80000             ; the kernel's log may be long; `out` must hold it all
READ_BYTES      equ 0x10000
LINE_BYTES      equ 4096

SYS_READ        equ 0
SYS_WRITE       equ 1
SYS_OPEN        equ 2
SYS_CLOSE       equ 3
SYS_IOCTL       equ 16
SYS_NANOSLEEP   equ 35
SYS_GETPID      equ 39
SYS_FORK        equ 57
SYS_EXECVE      equ 59
SYS_EXIT        equ 60
SYS_WAIT4       equ 61
SYS_SYSLOG      equ 103
SYS_SETSID      equ 112
SYS_MOUNT       equ 165
SYS_REBOOT      equ 169
SYS_GETAFFINITY equ 204
SYS_GETDENTS64  equ 217
SYS_CLOCK_GETTIME equ 228

O_DIRECTORY     equ 0x10000
TCSBRK          equ 0x5409              ; with argument 1: wait until all output is sent
TIOCSCTTY       equ 0x540e
CLOCK_REALTIME  equ 0
CLOCK_MONOTONIC equ 1
CLOCK_BOOTTIME  equ 7
SYSLOG_READ_ALL equ 3
DT_DIR          equ 4
REBOOT_MAGIC1   equ 0xfee1dead
REBOOT_MAGIC2   equ 672274793
RB_RESTART      equ 0x01234567
RB_HALT         equ 0xcdef0123
RB_POWER_OFF    equ 0x4321fedc

%macro SYSTEM 1                         ; system call %1
        mov     eax, %1
        syscall
%endmacro

%macro SAY 1+                           ; add a string to the output
        call    put_inline
        db      %1, 0
%endmacro

%macro MOUNT 2                          ; mount a file system of type %1 at %2
        lea     rdi, [%1]
        lea     rsi, [%2]
        call    mount
%endmacro

%macro COMMAND 3                        ; name, handler, what `help` says
        [section .strings]
%%name: db      %1, 0
%%help: db      %3, 0
        __?SECT?__
        dq      %%name, %2, %%help
%endmacro

        section .text start=0 vstart=CODE
        section .strings follows=.text vfollows=.text align=1 valign=1

        section .text

; --- ELF header, and three program headers: the file, memory for data, no executable stack ---

        db      0x7f, "ELF", 2, 1, 1, 0
        dq      0
        dw      2, 62                   ; ET_EXEC, EM_X86_64
        dd      1
        dq      start, 64, 0
        dd      0
        dw      64, 56, 3, 64, 0, 0

        dd      1, 5                    ; PT_LOAD, read and execute
        dq      0, CODE, CODE, file_bytes, file_bytes, 0x1000
        dd      1, 6                    ; PT_LOAD, read and write
        dq      0, DATA, DATA, 0, data_bytes, 0x1000
        dd      0x6474e551, 6           ; PT_GNU_STACK, read and write
        dq      0, 0, 0, 0, 0, 16

; --- start: mount, welcome, then a command per line until the end ---

start:  lea     r12, [out]
        xor     r13d, r13d              ; the console
        xor     r14d, r14d
        SYSTEM  SYS_GETPID
        cmp     eax, 1
        je      .first
        mov     rdi, [rsp + 16]         ; argv[1], or the NULL at the end
        test    rdi, rdi
        jz      welcome
        jmp     .script
.first: mov     r14d, 1
        MOUNT   proc, proc_dir
        MOUNT   sysfs, sys_dir
        MOUNT   devtmpfs, dev_dir       ; without it the nodes of the initramfs stay
        lea     rdi, [script]
.script:
        call    open
        test    eax, eax
        js      welcome
        mov     r13d, eax
        jmp     next

welcome:
        SAY     "Linux is up, and kvmtick makes its ticks. Try: ticks, date, uptime, "
        SAY     "cat /proc/interrupts; `help` lists all, `exit` powers off.", 10

next:   call    flush
        test    r13d, r13d
        jnz     .read
        SAY     "kvmtick# "
        call    flush
.read:  call    read_line
        jc      power_off               ; end of the script, or of the console
        call    run
        jmp     next

; Run the command in `line`; an empty line or a comment is none.
run:    lea     rsi, [line]
        call    next_word                    ; RDI = its name, RSI = its arguments
        cmp     byte [rdi], 0
        je      .done
        cmp     byte [rdi], '#'
        je      .done
        lea     rbx, [commands]
.find:  mov     rdx, [rbx]
        test    rdx, rdx
        jz      .unknown
        call    same
        je      .found
        add     rbx, 24
        jmp     .find
.found: jmp     [rbx + 8]
.unknown:
        SAY     "unknown command '"
        call    put
        SAY     "': `help` lists the commands", 10
.done:  ret

commands:
        COMMAND "cat", cat, "FILE...     print files"
        COMMAND "date", date, "            the clock: seconds since 1970, and UTC"
        COMMAND "dmesg", dmesg, "           the kernel's messages"
        COMMAND "echo", echo, "TEXT        print a text"
        COMMAND "exit", power_off, "            power off"
        COMMAND "help", help, "            this list"
        COMMAND "ls", ls, "DIR           names in a directory"
        COMMAND "nproc", nproc, "           CPUs that run us"
        COMMAND "poweroff", power_off, "        power off"
        COMMAND "reboot", reboot, "          restart the machine"
        COMMAND "sh", sh, "              busybox's shell, if the initramfs has it"
        COMMAND "sleep", sleep, "SECONDS    wait; fractions are possible"
        COMMAND "snapshot", snapshot, "NAME    interrupts, uptime and clocks, read at one moment"
        COMMAND "ticks", ticks, "           timer interrupts: sum = CPU 0 + CPU 1 + ..."
        COMMAND "uptime", uptime, "          seconds since the boot"
        dq      0

; --- commands ---

cat:    cmp     byte [rsi], 0
        je      needs_file
.next:  call    next_word
        cmp     byte [rdi], 0
        je      .done
        push    rsi
        call    open
        test    eax, eax
        js      .absent
        mov     ebp, eax
.more:  call    read_some               ; written at once: a file may make us wait for its rest
        push    rax
        call    flush
        pop     rax
        test    rax, rax
        jg      .more
        call    close
        jmp     .again
.absent:
        call    cannot_open
.again: pop     rsi
        jmp     .next
.done:  ret

needs_file:
        SAY     "cat needs a file: cat /proc/interrupts", 10
        ret

; "1700000000.123456789 2023-11-14T22:13:20Z". Every fourth year is a leap year until 2099.
date:   mov     edi, CLOCK_REALTIME
        call    clock
        call    put_time
        SAY     " "
        mov     rax, [time]
        xor     edx, edx
        mov     ecx, 86400
        div     rcx
        push    rdx                     ; second of the day
        mov     ebx, 1970
.year:  mov     ecx, 28                 ; days of February
        test    bl, 3
        jnz     .common
        inc     ecx
.common:
        lea     edx, [rcx + 365 - 28]
        cmp     eax, edx
        jb      .in_year
        sub     eax, edx
        inc     ebx
        jmp     .year
.in_year:
        xor     ebp, ebp
        lea     rdi, [months]
.month: movzx   edx, byte [rdi + rbp]
        cmp     ebp, 1
        cmove   edx, ecx
        cmp     eax, edx
        jb      .in_month
        sub     eax, edx
        inc     ebp
        jmp     .month
.in_month:
        push    rax
        mov     eax, ebx
        call    put_number
        SAY     "-"
        lea     eax, [rbp + 1]
        call    put_two
        SAY     "-"
        pop     rax
        inc     eax
        call    put_two
        SAY     "T"
        pop     rax
        xor     edx, edx
        mov     ecx, 3600
        div     ecx
        push    rdx
        call    put_two
        SAY     ":"
        pop     rax
        xor     edx, edx
        mov     ecx, 60
        div     ecx
        push    rdx
        call    put_two
        SAY     ":"
        pop     rax
        call    put_two
        SAY     "Z", 10
        ret

dmesg:  mov     edi, SYSLOG_READ_ALL
        lea     rsi, [text]
        mov     edx, TEXT_BYTES - 1
        SYSTEM  SYS_SYSLOG
        test    eax, eax
        js      .refused
        lea     rsi, [text]
        mov     byte [rsi + rax], 0
.line:  cmp     byte [rsi], '<'         ; "<6>": facility and level
        jne     .copy
.level: lodsb
        cmp     al, '>'
        jne     .level
.copy:  lodsb
        test    al, al
        jz      .done
        call    put_char
        cmp     al, 10
        je      .line
        jmp     .copy
.refused:
        SAY     "the kernel does not show its messages to us: this needs to be root", 10
.done:  ret

echo:   mov     rdi, rsi
        call    put
        mov     al, 10
        jmp     put_char

help:   lea     rbx, [commands]
.next:  mov     rdi, [rbx]
        test    rdi, rdi
        jz      .done
        call    put
        SAY     " "
        mov     rdi, [rbx + 16]
        call    put
        SAY     10
        add     rbx, 24
        jmp     .next
.done:  ret

; Names in the order of the file system, directories with a slash.
ls:     call    next_word
        cmp     byte [rdi], 0
        jne     .open
        lea     rdi, [root]
.open:  mov     esi, O_DIRECTORY
        call    open_as
        test    eax, eax
        js      cannot_open
        mov     ebp, eax
.more:  mov     edi, ebp
        lea     rsi, [text]
        mov     edx, TEXT_BYTES
        SYSTEM  SYS_GETDENTS64
        test    eax, eax
        jle     close
        lea     rbx, [text]
        lea     r15, [rbx + rax]
.entry: lea     rdi, [rbx + 19]         ; struct linux_dirent64: d_name
        cmp     word [rdi], '.'
        je      .skip
        cmp     word [rdi], '..'
        jne     .show
        cmp     byte [rdi + 2], 0
        je      .skip
.show:  call    put
        cmp     byte [rbx + 18], DT_DIR ; d_type
        jne     .end
        SAY     "/"
.end:   SAY     10
.skip:  movzx   eax, word [rbx + 16]    ; d_reclen
        add     rbx, rax
        cmp     rbx, r15
        jb      .entry
        call    flush
        jmp     .more

nproc:  xor     edi, edi
        mov     esi, TEXT_BYTES
        lea     rdx, [text]
        SYSTEM  SYS_GETAFFINITY         ; a bit per CPU; returns bytes
        lea     ecx, [rax * 8]
        xor     eax, eax
.bit:   dec     ecx
        js      .say
        bt      [rdx], ecx
        adc     eax, 0
        jmp     .bit
.say:   call    put_number
        SAY     10
        ret

; Both are for process 1 only: another one has no say about the machine.
reboot: mov     edx, RB_RESTART
        call    end_machine
        jmp     power_off

; Without ACPI nothing switches a PC off: Linux would halt for ever, so restart it.
power_off:
        call    flush
        lea     rdi, [acpi_folder]
        call    open
        mov     edx, RB_POWER_OFF
        mov     ecx, RB_RESTART
        test    eax, eax
        cmovs   edx, ecx
        call    end_machine
        mov     edx, RB_HALT            ; nothing here can switch it off
        call    end_machine
        xor     edi, edi
        SYSTEM  SYS_EXIT

end_machine:
        test    r14d, r14d
        jz      .done
        call    drain
        mov     edi, REBOOT_MAGIC1
        mov     esi, REBOOT_MAGIC2
        SYSTEM  SYS_REBOOT
.done:  ret

; The shell has a session of its own, with the console as its terminal, so that ^C reaches it.
sh:     SYSTEM  SYS_FORK
        test    eax, eax
        jz      .child
        mov     ebx, eax
.wait:  mov     edi, -1                 ; as process 1 we wait for orphans too
        xor     esi, esi
        xor     edx, edx
        xor     r10d, r10d
        SYSTEM  SYS_WAIT4
        test    eax, eax
        js      .done
        cmp     eax, ebx
        jne     .wait
.done:  ret
.child: SYSTEM  SYS_SETSID
        xor     edi, edi
        mov     esi, TIOCSCTTY
        mov     edx, 1
        SYSTEM  SYS_IOCTL
        lea     rdi, [busybox]
        lea     rsi, [shell_arguments]
        lea     rdx, [shell_environment]
        SYSTEM  SYS_EXECVE
        SAY     "no /bin/busybox here: give the initramfs a static one (`help` lists what is here)", 10
        call    flush
        mov     edi, 1
        SYSTEM  SYS_EXIT

sleep:  call    number                  ; RAX = seconds, RDX = nanoseconds
        jc      .wrong
        mov     [time], rax
        mov     [time + 8], rdx
        lea     rdi, [time]
        xor     esi, esi
        SYSTEM  SYS_NANOSLEEP
        ret
.wrong: SAY     "sleep needs a number of seconds: sleep 0.5", 10
        ret

; A line before, sent entirely, tells the host when; then all is read before any of it is printed.
snapshot:
        call    next_word
        cmp     byte [rdi], 0
        je      .name
        mov     rbx, rdi
        call    .title
        SAY     "...", 10
        call    flush
        call    drain
        call    .title
        SAY     "begin", 10
        lea     rdi, [interrupts]
        call    put_file
        lea     rdi, [uptime_file]
        call    put_file
        mov     edi, CLOCK_MONOTONIC
        call    clock
        SAY     "monotonic_ns "
        call    put_ns
        mov     edi, CLOCK_REALTIME
        call    clock
        SAY     "realtime_ns "
        call    put_ns
        call    .title
        SAY     "end", 10
        ret
.title: SAY     "snapshot "
        mov     rdi, rbx
        call    put
        SAY     " "
        ret
.name:  SAY     "snapshot needs a name: snapshot before", 10
        ret

; Lines of /proc/interrupts: " LABEL:  COUNT COUNT ...  DESCRIPTION", a count per CPU.
ticks:  push    r12
        lea     r12, [text]
        lea     rdi, [interrupts]
        call    put_file
        mov     byte [r12], 0
        pop     r12
        lea     rsi, [text]
.line:  call    skip_blanks
        cmp     byte [rsi], 0
        je      .done
        mov     rdi, rsi
        lea     rbx, [timer_labels]
.label: mov     rdx, [rbx]
        test    rdx, rdx
        jz      .next
        call    starts
        je      .show
        add     rbx, 8
        jmp     .label
.show:  mov     rsi, rcx                ; behind the colon
        mov     rdi, rdx
        call    put
        SAY     " "
        push    rsi
        xor     ebp, ebp
.add:   call    decimal
        jc      .sum
        add     rbp, rax
        jmp     .add
.sum:   mov     rax, rbp
        call    put_number
        SAY     " ="
        pop     rsi
        xor     ebp, ebp
.cpu:   call    decimal
        jc      .rest
        push    rax
        test    ebp, ebp
        jz      .first
        SAY     " +"
.first: inc     ebp
        SAY     " "
        pop     rax
        call    put_number
        jmp     .cpu
.rest:  SAY     "  "
.copy:  mov     al, [rsi]
        cmp     al, 10
        je      .end
        call    put_char
        inc     rsi
        jmp     .copy
.end:   SAY     10
.next:  lodsb
        cmp     al, 10
        je      .line
        test    al, al
        jnz     .next
.done:  ret

uptime: mov     edi, CLOCK_BOOTTIME
        call    clock
        call    put_time
        SAY     10
        ret

; --- input ---

; A line of R13 into `line`, its control characters as blanks. Carry: there is none. What does not
; fit is left out.
read_line:
        lea     rbx, [line]
        lea     rbp, [line + LINE_BYTES - 1]
.next:  mov     edi, r13d
        lea     rsi, [byte_read]
        mov     edx, 1
        SYSTEM  SYS_READ
        cmp     rax, 1
        jne     .end
        mov     al, [byte_read]
        cmp     al, 10
        je      .done
        cmp     al, ' '
        jae     .keep
        mov     al, ' '
.keep:  cmp     rbx, rbp
        je      .next
        mov     [rbx], al
        inc     rbx
        jmp     .next
.end:   lea     rax, [line]             ; a last line may have no newline
        cmp     rbx, rax
        je      .none
.done:  mov     byte [rbx], 0
        clc
        ret
.none:  stc
        ret

; The next word of RSI: RDI = it, NUL-terminated; RSI = what follows its blanks.
next_word:
        call    skip_blanks
        mov     rdi, rsi
.next:  cmp     byte [rsi], ' '
        jbe     .end
        inc     rsi
        jmp     .next
.end:   cmp     byte [rsi], 0
        je      skip_blanks.done
        mov     byte [rsi], 0
        inc     rsi
skip_blanks:
        cmp     byte [rsi], ' '
        jne     .done
        inc     rsi
        jmp     skip_blanks
.done:  ret

; Zero flag: the strings RDI and RDX are the same.
same:   call    starts
        jne     .done
        cmp     byte [rcx], 0
.done:  ret

; Zero flag: RDI starts with the string RDX; then RCX = what follows. Clobbers AL, RCX.
starts: push    rdx
        mov     rcx, rdi
.next:  mov     al, [rdx]
        test    al, al
        jz      .done
        cmp     al, [rcx]
        jne     .done
        inc     rdx
        inc     rcx
        jmp     .next
.done:  pop     rdx
        ret

; A decimal number of RSI, after blanks: RAX. Carry: there is none. Clobbers RCX, RDI.
decimal:
        call    skip_blanks
        xor     eax, eax
        mov     rdi, rsi
.next:  movzx   ecx, byte [rsi]
        sub     ecx, '0'
        cmp     ecx, 10
        jae     .end
        imul    rax, rax, 10
        add     rax, rcx
        inc     rsi
        jmp     .next
.end:   cmp     rsi, rdi                ; no digit: carry
        je      .none
        clc
        ret
.none:  stc
        ret

; Seconds of RSI with up to nine decimals: RAX, and nanoseconds in RDX. Carry: it is not that.
number: call    decimal
        jc      .done
        push    rax
        xor     edx, edx
        cmp     byte [rsi], '.'
        jne     .end
        inc     rsi
        mov     r8d, 100000000
.digit: movzx   eax, byte [rsi]
        sub     eax, '0'
        cmp     eax, 10
        jae     .end
        imul    eax, r8d
        add     edx, eax
        mov     eax, r8d
        push    rdx
        xor     edx, edx
        mov     ecx, 10
        div     ecx
        pop     rdx
        mov     r8d, eax
        inc     rsi
        jmp     .digit
.end:   pop     rax
        call    skip_blanks
        cmp     byte [rsi], 1           ; carry unless it ends here
        cmc
.done:  ret

; --- files ---

open:   xor     esi, esi                ; O_RDONLY
open_as:
        SYSTEM  SYS_OPEN
        ret

; Close EBP.
close:  mov     edi, ebp
        SYSTEM  SYS_CLOSE
        ret

; Add what one read of EBP gives to the output: RAX = bytes, or negative.
read_some:
        lea     rax, [out + OUT_BYTES - READ_BYTES]
        cmp     r12, rax
        ja      .full
.read:  mov     edi, ebp
        mov     rsi, r12
        mov     edx, READ_BYTES
        SYSTEM  SYS_READ
        test    rax, rax
        jle     .done
        add     r12, rax
.done:  ret
.full:  call    flush
        jmp     .read

; Add the file RDI to the output, and say so if it cannot be opened.
put_file:
        push    rbp
        call    open
        test    eax, eax
        js      .absent
        mov     ebp, eax
.more:  call    read_some
        test    rax, rax
        jg      .more
        call    close
        pop     rbp
        ret
.absent:
        pop     rbp
cannot_open:                            ; RDI = path, EAX = -errno
        push    rax
        SAY     "cannot open "
        call    put
        SAY     ": error "
        pop     rax
        neg     eax
        call    put_number
        SAY     "; `ls DIR` shows what is there", 10
        ret

; Mount type RDI at RSI.
mount:  mov     rdx, rdi
        xor     r10d, r10d
        xor     r8d, r8d
        SYSTEM  SYS_MOUNT
        ret

; --- time ---

; Read clock EDI into `time`.
clock:  lea     rsi, [time]
        SYSTEM  SYS_CLOCK_GETTIME
        ret

put_time:                               ; as seconds with nine decimals
        mov     rax, [time]
        call    put_number
        SAY     "."
        mov     rax, [time + 8]
        mov     ecx, 9
        jmp     put_digits

put_ns: imul    rax, [time], 1000000000
        add     rax, [time + 8]
        call    put_number
        SAY     10
        ret

; --- output ---

; Add the string behind the call, and return behind it. Keeps all registers but RAX.
put_inline:
        xchg    rdi, [rsp]
        call    put
        inc     rax
        mov     rdi, rax
        xchg    rdi, [rsp]
        ret

; Add the string RDI; RAX = its end. Keeps all other registers.
put:    push    rdi
.next:  mov     al, [rdi]
        test    al, al
        jz      .done
        mov     [r12], al
        inc     r12
        inc     rdi
        jmp     .next
.done:  mov     rax, rdi
        pop     rdi
        ret

put_char:
        mov     [r12], al
        inc     r12
        ret

put_two:
        mov     ecx, 2
        jmp     put_digits
put_number:
        mov     ecx, 1
; Add RAX in decimal with at least ECX digits. Clobbers RAX, RCX, RDX, R8.
put_digits:
        push    rdi
        push    rbx
        mov     ebx, 10
        lea     rdi, [digits_end]
        mov     r8, rdi
.next:  xor     edx, edx
        div     rbx
        add     dl, '0'
        dec     rdi
        mov     [rdi], dl
        dec     ecx
        jg      .next
        test    rax, rax
        jnz     .next
.copy:  mov     al, [rdi]
        call    put_char
        inc     rdi
        cmp     rdi, r8
        jb      .copy
        pop     rbx
        pop     rdi
        ret

; Write the output gathered; on an error it is dropped. Keeps RDI and RSI.
flush:  push    rdi
        push    rsi
        lea     rsi, [out]
.more:  mov     rdx, r12
        sub     rdx, rsi
        jz      .done
        mov     edi, 1
        SYSTEM  SYS_WRITE
        test    rax, rax
        jle     .done
        add     rsi, rax
        jmp     .more
.done:  lea     r12, [out]
        pop     rsi
        pop     rdi
        ret

; Wait until the terminal has sent all. Keeps RDX.
drain:  push    rdx
        mov     edi, 1
        mov     esi, TCSBRK
        mov     edx, 1
        SYSTEM  SYS_IOCTL
        pop     rdx
        ret

; --- constants ---

timer_labels:
        dq      label_0, label_nmi, label_loc, label_res, label_cal, 0
label_0:        db "0:", 0
label_nmi:      db "NMI:", 0
label_loc:      db "LOC:", 0
label_res:      db "RES:", 0
label_cal:      db "CAL:", 0

shell_arguments:
        dq      sh_name, sh_c, sh_text, 0
shell_environment:
        dq      sh_path, sh_home, sh_term, 0
sh_name:        db "sh", 0
sh_c:           db "-c", 0
sh_text:        db "[ -e /bin/ls ] || /bin/busybox --install -s /bin; exec /bin/busybox sh", 0
sh_path:        db "PATH=/bin", 0
sh_home:        db "HOME=/", 0
sh_term:        db "TERM=linux", 0
busybox:        db "/bin/busybox", 0

months: db      31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31
proc:           db "proc", 0
proc_dir:       db "/proc", 0
sysfs:          db "sysfs", 0
sys_dir:        db "/sys", 0
devtmpfs:       db "devtmpfs", 0
dev_dir:        db "/dev", 0
root:           db "/", 0
script:         db "/script", 0
interrupts:     db "/proc/interrupts", 0
uptime_file:    db "/proc/uptime", 0
acpi_folder:    db "/sys/firmware/acpi", 0

        section .strings
file_end:
file_bytes      equ file_end - CODE

        absolute DATA
time:           resq 2                  ; struct timespec
byte_read:      resb 1
digits:         resb 24
digits_end:
line:           resb LINE_BYTES
text:           resb TEXT_BYTES
out:            resb OUT_BYTES
data_bytes      equ $ - DATA
