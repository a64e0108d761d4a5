# What the hooks of ganeti-instance-image source (`. common.sh`, with bash): its functions and variables, so that a
# site's hooks run unchanged. New hooks need none of it: everything is in their environment (see README.rst).
# shellcheck shell=bash disable=SC2034

AWK=awk
DUMP=dump
KPARTX=kpartx
LOSETUP=losetup
MKDIR_P="mkdir -p"
PARTED=parted
QEMU_IMG=qemu-img
SFDISK=sfdisk
# Commands that print a filesystem's UUID and type: $VOL_ID DEVICE
VOL_ID="blkid -c /dev/null -o value -s UUID"
VOL_TYPE="blkid -c /dev/null -o value -s TYPE"

SCRIPT_NAME=${0##*/}
KERNEL_PATH=${INSTANCE_HV_kernel_path-}
INSTANCE_MEM=${INSTANCE_BE_memory:-${INSTANCE_BE_maxmem-}}
instance=${INSTANCE_NAME-}
old_name=${OLD_INSTANCE_NAME-}
blockdev=${BLOCKDEV-}
root_dev=${ROOT_DEV-}
boot_dev=${BOOT_DEV-}
swap_dev=${SWAP_DEV-}

log_error() {
  echo "$@" >&2
}

# debug COMMAND...: only with IMAGE_DEBUG, as in `debug set -x`
debug() {
  case ${IMAGE_DEBUG-} in
    1 | yes) "$@" ;;
  esac
}

# Commands to run at the end, the last one first: CLEANUP+=("umount /mnt")
CLEANUP=()

cleanup() {
  local i
  for ((i = ${#CLEANUP[@]} - 1; i >= 0; i--)); do
    # unquoted: each element is a whole command line
    ${CLEANUP[i]}
  done
  CLEANUP=()
}
trap cleanup EXIT

# get_os_type ROOT: sets OS_TYPE to redhat, debian, gentoo or suse
get_os_type() { _ask_guest get_os_type "$@"; }

# get_os ROOT: sets OPERATING_SYSTEM to the distribution's name in lower case: debian, ubuntu, centos, fedora, ...
get_os() { _ask_guest get_os "$@"; }

# get_os_release ROOT: sets OS_RELEASE to the distribution's version
get_os_release() { _ask_guest get_os_release "$@"; }

# _ask_guest CALLER ROOT: sets all three. imageos reads the guest's files: paths below ROOT may be links that lead to
# the node, or files that never end.
_ask_guest() {
  local facts name value
  if [[ -z ${2-} ]]; then
    log_error "target is not set in $1"
    exit 1
  fi
  facts=$("${IMAGEOS:-/usr/share/ganeti/os/image/imageos}" --os-release "$2") || exit 1
  while IFS== read -r name value; do
    printf -v "$name" %s "$value"
  done <<<"$facts"
}
